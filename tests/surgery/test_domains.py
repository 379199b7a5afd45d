"""Domains are added, removed, renamed and merged: what others do stays as it was."""

import copy
from typing import Any

import pytest
import torch

from helpers.domains import ENCODER_AND_MEMORY, add_learned_domain, clip_masks, new_model, with_two_domains
from helpers.edgetam import edgetam_model, needs_timm
from helpers.interaction import draw_weights, tiny_config
from helpers.prompted import frames
from helpers.sam3 import sam3_config, sam3_models
from samoe_hf import SamoeModel, VideoSession
from samoe_hf.continual.fit_gate import decide_videos, fit_gate
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import (
    add_domain,
    confirm_domain,
    copy_domain_experts,
    fit_domain,
    merge_domains,
    remove_domain,
    rename_domain,
)
from samoe_hf.surgery.experts import (
    freeze_experts,
    grow_experts,
    merge_experts,
    prune_experts,
    replace_experts,
    reset_expert,
)
from samoe_hf.surgery.loras import add_expert, add_lora_domain, export_expert
from samoe_hf.surgery.ranks import set_ranks, sort_directions


@pytest.fixture
def model(gated):
    """Free to be changed."""
    return copy.deepcopy(gated)


@pytest.fixture(scope="module")
def processor(gated):
    return build_processor(gated.config)


def assert_same_masks(model, expected, batch, *domains):
    assert all(torch.equal(clip_masks(model, batch, name), clip_masks(expected, batch, name)) for name in domains)


def test_adding_a_domain_changes_nothing_of_the_others(gated, model, domain_videos, processor):
    video = domain_videos["blobs"][20]
    expected, _ = segment_video(model, processor, video)
    add_learned_domain(model, "c", 3, expert_modules=["qkv", "proj_in", "q_proj", "k_proj", "linear1", "linear2"])
    fit_gate(model, processor, "c", [domain_videos["shapes"][i] for i in range(8)], show_progress_bar=False)
    after = model.state_dict()
    for name, tensor in gated.state_dict().items():
        kept = after[name][: len(tensor)] if name.startswith("domain_gate.") else after[name]
        assert torch.equal(kept, tensor), name
    assert (segment_video(model, processor, video)[0] == expected).all()
    assert model.config.domain_names == ["a", "b", "c"]


TINY = {
    "sam2": lambda: drawn(SamoeModel(tiny_config())),
    "sam3": lambda: sam3_models(sam3_config())[0],
    "edgetam": edgetam_model,
}


def drawn(model):
    draw_weights(model, with_experts=False)
    return model.eval()


@torch.no_grad()
def tracked(model, domain):
    """Logits (frames, 2, 1, H, W) of two objects that are propagated by a domain's experts."""
    processor: Any = build_processor(model.config)
    session = VideoSession(frames(3), processor, domain=domain)
    points = {"input_points": [[[[20, 30]], [[60, 30]]]], "input_labels": [[[1], [1]]]}
    processor.add_inputs_to_inference_session(session, 0, [1, 2], **points)
    return torch.stack([x.pred_masks for x in model.propagate_in_video_iterator(session, 0)])


@pytest.mark.parametrize("base", ["sam2", "sam3", pytest.param("edgetam", marks=[needs_timm, pytest.mark.slow])])
def test_experts_of_any_layer_change_no_bit_of_what_others_track(base):
    model = TINY[base]()
    plain = tracked(model, None)
    add_learned_domain(model, "old", 1, num_experts=3, expert_modules=["q_proj", "mask_decoder.iou_prediction_head.*"])
    expected = tracked(model, "old")
    assert not torch.equal(expected, plain)
    for name, count in {"one": 1, "several": 2}.items():
        add_learned_domain(model, name, 2, num_experts=count, num_experts_per_tok=1, expert_modules="*")
        assert torch.equal(tracked(model, None), plain) and torch.equal(tracked(model, "old"), expected)
        assert not torch.equal(tracked(model, name), plain)
    remove_domain(model, "one")
    remove_domain(model, "old")
    assert torch.equal(tracked(model, None), plain)


def test_domains_are_removed_and_renamed(gated, model, two_clips, processor, domain_videos):
    remove_domain(model, "a")
    rename_domain(model, "b", "type")  # a name that modules have an attribute of
    assert torch.equal(clip_masks(model, two_clips, "type"), clip_masks(gated, two_clips, "b"))
    assert model.config.domain_names == ["type"]
    assert not any("domain_a" in name or "domain_b" in name for name in model.state_dict())
    assert next(decide_videos(model, processor, [domain_videos["stripes"][23]])).domain == "type"
    remove_domain(model, "type")
    plain = {name for name in new_model().state_dict() if "lora_" not in name and "router" not in name}
    assert {name for name in model.state_dict() if not name.startswith("domain_gate")} == plain
    nothing = torch.zeros(2, 1), torch.zeros(2)
    changes = [(remove_domain,), (rename_domain, "x"), (fit_domain, *nothing), (confirm_domain, nothing[0])]
    for without in (model, new_model()):
        for change, *arguments in (*changes, (sort_directions,), (set_ranks, 2)):
            with pytest.raises(ValueError, match="The model has no domain 'a'; there are none"):
                change(without, "a", *arguments)


def test_two_peoples_domains_are_put_side_by_side(gated, model, two_clips, processor, domain_videos):
    mine, yours = model, copy.deepcopy(gated)
    remove_domain(mine, "b")
    remove_domain(yours, "a")
    yours.config.older_memory_pooling = 2
    with pytest.raises(ValueError, match="`older_memory_pooling` is 1 in this model, but 2 in the other"):
        merge_domains(mine, yours)
    yours.config.older_memory_pooling = 1
    assert merge_domains(mine, yours) == ["b"]
    assert_same_masks(mine, gated, two_clips, "a", "b", None)
    videos = [domain_videos[kind][23] for kind in ("blobs", "stripes")]
    assert [decision.domain for decision in decide_videos(mine, processor, videos)] == ["a", "b"]
    rename_domain(yours, "b", "B")
    with pytest.raises(ValueError, match="have a domain 'b', and the other's 'B' differs by upper and lower case"):
        merge_domains(mine, yours)
    rename_domain(yours, "B", "c")
    yours.mask_decoder.iou_token.weight.data += 1
    with pytest.raises(ValueError, match="different bases"):
        merge_domains(mine, yours)
    assert mine.config.domain_names == ["a", "b"]


def test_experts_of_no_domain_become_a_domain(two_clips):
    model = new_model()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    expected, tensors = clip_masks(model, two_clips, None), len(model.state_dict())
    with pytest.raises(ValueError, match=r"`rename_domain\(model, None, NAME\)` makes a domain of them"):
        add_domain(model, "new")
    rename_domain(model, None, "old")
    assert torch.equal(clip_masks(model, two_clips, "old"), expected)
    assert_same_masks(model, new_model(), two_clips, None)
    assert len(model.state_dict()) == tensors + 13
    add_domain(model, "new", like="old")
    assert torch.equal(clip_masks(model, two_clips, "new"), expected)


def test_a_new_domain_starts_from_experts_of_the_same_kind_alone(model, two_clips):
    add_domain(model, "like_a", like="a")
    settings = {name: value for name, value in model.config.domains[0].items() if name != "name"}
    add_domain(model, "new", **settings)
    add_domain(model, "smaller", **{**settings, "lora_rank": 1})
    assert not torch.equal(clip_masks(model, two_clips, "new"), clip_masks(model, two_clips, "a"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not copy_domain_experts(model, "a", "smaller") and not copy_domain_experts(model, "a", "like_a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert copy_domain_experts(model, "a", "new") and not copy_domain_experts(model, "new", "new")
    assert torch.equal(clip_masks(model, two_clips, "new"), clip_masks(model, two_clips, "a"))
    with pytest.raises(ValueError, match="The model has no domain 'z'"):
        copy_domain_experts(model, "z", "new")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a", {}, "is the name of a domain that the model has"),
        ("A", {}, "'A' is the name of a domain that the model has, 'a'"),  # files of these names can be the same
        ("auto", {}, "be none of auto, none, base"),
        ("Con", {}, "`name` must not be 'Con', since Windows has no file of that name"),
        ("x.y", {}, r"must be of letters \(a to z\), digits, _ and -"),
        (5, {}, "must be of letters"),
        ("c", {"num_experts": 2, "num_experts_per_tok": 3}, r"Domain 'c': `num_experts_per_tok` must be at most"),
        ("c", {"num_experts": -1}, "`num_experts` must be an integer of at least 1"),
        ("c", {"expert_modules": ["nothing"]}, "matches no layer"),
        ("c", {"rank": 2}, "`settings` must be among"),
        ("c", {"like": "z"}, "The model has no domain 'z'"),
        ("c", {"like": "a", "lora_rank": 2}, "`like` 'a' says what"),
    ],
)
def test_domains_that_cannot_be_are_refused_and_nothing_changes(gated, name, settings, message):
    before = set(gated.state_dict())
    with pytest.raises(ValueError, match=message):
        add_domain(gated, name, **settings)
    assert set(gated.state_dict()) == before and gated.config.domain_names == ["a", "b"]


CHANGES = {
    prune_experts: {"keep": [0]}, merge_experts: {"experts": [0, 1]}, grow_experts: {"num_new": 1},
    reset_expert: {"expert": 0}, freeze_experts: {"experts": [0]}, replace_experts: {"lora_rank": 2},
    add_expert: {"source": "x/y"}, export_expert: {"expert": 0, "directory": "x/y"},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_surgery_on_single_experts_is_for_models_without_domains(gated, change):
    with pytest.raises(ValueError, match="belong to domains"):
        change(gated, **CHANGES[change])


def test_a_lora_of_peft_becomes_a_domain_and_back(two_clips, tmp_path):
    model, other = with_two_domains(), new_model()
    options = {"num_experts": 1, "num_experts_per_tok": 1, "lora_rank": 2, "expert_modules": ENCODER_AND_MEMORY}
    add_learned_domain(model, "one", 0, **options)
    export_expert(model, 0, tmp_path / "lora", domain="one")
    add_lora_domain(other, "mine", tmp_path / "lora")
    expected = clip_masks(model, two_clips, "one")
    torch.testing.assert_close(clip_masks(other, two_clips, "mine"), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`expert` must be integers from 0 to 0"):
        export_expert(model, 1, tmp_path / "more", domain="one")


def test_a_model_whose_last_domain_was_removed_gets_another(nano, tmp_path):
    model = copy.deepcopy(nano.model)
    rename_domain(model, None, "former")
    remove_domain(model, "former")
    model.save_pretrained(tmp_path)
    model = SamoeModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no parameters of 'experts'"):
        model.set_trainable("experts")
    add_domain(model, "next", num_experts=2)
    model.set_trainable("domain:next")
    assert all(p.requires_grad for _, experts in domain_modules(model, "next") for p in experts.parameters())


def test_a_state_dict_of_another_order_of_domains_goes_by_name(nano):
    def named(*names):
        model = copy.deepcopy(nano.model)
        rename_domain(model, None, names[0])
        add_domain(model, names[1])
        return model

    first, second = named("a", "b"), named("b", "a")
    features = torch.randn(8, first.domain_gate.num_features)
    fit_domain(first, "a", features, torch.arange(8))
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        assert model.config.domain_names[int(model.domain_gate.decide(features[:1]).domain)] == "a"
    with pytest.raises(RuntimeError, match="is of other domains than this model's, a, c"):
        named("a", "c").load_state_dict(first.state_dict())
