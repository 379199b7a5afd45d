"""Experts of domains: whose are run, that others do not change, and that they survive all that is done to a model."""

import copy
import threading

import pytest
import torch
import yaml
from peft import LoraConfig

from helpers.reference import ROOT
from samoe_hf import SamoeConfig, SamoeModel, VideoSession
from samoe_hf.analysis.routing import routing_maps
from samoe_hf.analysis.usage import expert_usage
from samoe_hf.continual.fit_gate import decide_videos, fit_gate
from samoe_hf.data.synthetic import SyntheticVideos
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.inference import VideoPrompt, track_video
from samoe_hf.model.base_model import build_on_meta
from samoe_hf.model.configuration_samoe import EXPERT_SETTINGS
from samoe_hf.model.domain_experts import domain_modules, use_domain
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.expert_router import record_router_logits
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.original.checkpoint import save_original
from samoe_hf.surgery.domains import add_domain, copy_domain_experts, merge_domains, remove_domain, rename_domain
from samoe_hf.surgery.experts import (
    freeze_experts,
    grow_experts,
    merge_experts,
    prune_experts,
    replace_experts,
    reset_expert,
)
from samoe_hf.surgery.loras import add_expert, add_lora_domain, export_expert

ALL_LAYERS = ["qkv", "proj_in", "q_proj", "k_proj", "v_proj", "o_proj", "linear1", "linear2"]
ENCODER_AND_MEMORY = ["qkv", "q_proj", "v_proj"]


def new_model() -> SamoeModel:
    torch.manual_seed(0)
    settings = yaml.safe_load((ROOT / "configs" / "model_nano.yaml").read_text())
    model = SamoeModel(SamoeConfig(**settings)).eval()
    # So that a random model sees objects, whose masks can then differ.
    list(model.mask_decoder.pred_obj_score_head.parameters())[-1].data.fill_(10)
    return model


def add_learned_domain(model: SamoeModel, name: str, seed: int, **settings) -> None:
    """A domain whose experts have an effect."""
    torch.manual_seed(seed)
    add_domain(model, name, **settings)
    for _, experts in domain_modules(model, name):
        torch.nn.init.normal_(experts.lora_B, std=0.1)


def with_two_domains() -> SamoeModel:
    """Two domains of different sizes in different layers; experts of the second are in the encoder too."""
    model = new_model()
    add_learned_domain(model, "a", 1, num_experts=3, num_experts_per_tok=1, lora_rank=2)
    add_learned_domain(model, "b", 2, num_experts=4, lora_rank=3, expert_modules=ENCODER_AND_MEMORY)
    return model


@pytest.fixture(scope="module")
def base() -> SamoeModel:
    return new_model()


@pytest.fixture(scope="module")
def model() -> SamoeModel:
    return with_two_domains()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, 2, 3, 128, 128, dtype=torch.bool)
    labels[:, 0, :, 10:50, 10:50] = True
    labels[:, 1, :, 60:100, 60:110] = True
    return torch.randn(2, 3, 3, 128, 128, generator=generator), labels


@pytest.fixture(scope="module")
def videos():
    return {name: SyntheticVideos(24, 3, domain=name, seed=5) for name in ("shapes", "blobs", "stripes")}


@pytest.fixture(scope="module")
def processor(model):
    return build_processor(model.config)


@pytest.fixture(scope="module")
def gated(processor, videos):
    """The gate knows blobs and stripes as domains a and b."""
    model = with_two_domains()
    for name, kind in (("a", "blobs"), ("b", "stripes")):
        fit_gate(model, processor, name, videos[kind], show_progress_bar=False)
    return model


def masks(model, batch, domain):
    with torch.no_grad():
        return model(*batch, domain=domain).pred_masks


def test_a_clip_of_no_domain_gets_the_base_output_to_the_bit(base, model, batch):
    expected = masks(base, batch, None)
    assert torch.equal(masks(model, batch, None), expected)
    assert not torch.equal(masks(model, batch, "a"), expected)
    assert not torch.equal(masks(model, batch, "b"), masks(model, batch, "a"))


@pytest.mark.parametrize("domains", [["a", "b"], [None, "b"], ["a", "a"], ["b", "a", "b"], ["a", None, "b", "a"]])
def test_clips_of_different_domains_in_one_batch_give_what_each_gives_alone(model, batch, domains):
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(len(domains), *batch[0].shape[1:], generator=generator)
    batch = (frames, batch[1][:1].expand(len(domains), -1, -1, -1, -1))
    together = model(*batch, domain=domains)
    assert together.domains == domains
    losses = []
    for row, domain in enumerate(domains):
        one = model(batch[0][row : row + 1], batch[1][row : row + 1], domain=domain)
        torch.testing.assert_close(together.pred_masks[row], one.pred_masks[0], rtol=1e-4, atol=1e-4)
        losses.append(one.loss)
    torch.testing.assert_close(together.loss, sum(losses) / len(losses), rtol=1e-4, atol=1e-4)


def test_gradients_of_a_mixed_batch_are_those_of_its_clips(batch):
    model = with_two_domains().train()
    model.set_trainable("experts")

    def gradients(*calls):
        model.zero_grad()
        for rows, domain in calls:
            (model(batch[0][rows], batch[1][rows], domain=domain).loss * len(rows) / 2).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    mixed, apart = gradients(([0, 1], ["b", "a"])), gradients(([0], "b"), ([1], "a"))
    assert mixed.keys() == apart.keys() and len(mixed) > 20
    for name, gradient in mixed.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-3, atol=1e-4)


def test_checkpointed_frames_are_recomputed_with_their_domains_experts(batch):
    model = with_two_domains().train()
    model.set_trainable("experts")

    def gradients():
        model.zero_grad()
        model(*batch, domain=["a", "b"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_a_domain_changes_no_bit_of_others(batch, optimizer):
    model = with_two_domains()
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    before = copy.deepcopy(model.state_dict())
    expected = {domain: masks(model, batch, domain) for domain in (None, "a")}
    model.train()
    trained = optimizer(model.parameters(), lr=0.1, weight_decay=0.5, **options)
    for chosen in (("domain:a", "domain:b"), ("domain:b",)):
        # The first step gives momentum to both.
        model.set_trainable(*chosen)
        if chosen == ("domain:b",):
            before = copy.deepcopy(model.state_dict())
            model.eval()
            expected = {domain: masks(model, batch, domain) for domain in (None, "a")}
            model.train()
        for domain in [name.removeprefix("domain:") for name in chosen]:
            model(*batch, domain=domain).loss.backward()
        trained.step()
        trained.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".domain_b." in name for name in changed)
    model.eval()
    assert all(torch.equal(masks(model, batch, domain), tensor) for domain, tensor in expected.items())


def test_adding_a_domain_changes_nothing_of_the_others(gated, batch, videos, processor):
    model = copy.deepcopy(gated)
    before = copy.deepcopy(model.state_dict())
    video = videos["blobs"][20]
    expected, _ = segment_video(model, processor, video)
    add_learned_domain(model, "c", 3, expert_modules=ALL_LAYERS)
    fit_gate(model, processor, "c", videos["shapes"], show_progress_bar=False)
    after = model.state_dict()
    for name, tensor in before.items():
        kept = after[name][: len(tensor)] if name.startswith("domain_gate.") else after[name]
        assert torch.equal(kept, tensor), name
    assert (segment_video(model, processor, video)[0] == expected).all()
    assert model.config.domain_names == ["a", "b", "c"]


def test_the_gate_decides_for_a_session_and_says_how_sure_it_is(gated, base, processor, videos):
    names = {"blobs": "a", "stripes": "b", "shapes": None}
    for kind, expected in names.items():
        video = videos[kind][21]
        ids = video.visible(0)
        prompts = [VideoPrompt(i, mask=m) for i, m in zip(ids, video.masks(0, ids), strict=True)]
        frames = list(track_video(gated, processor, video.frames, prompts))
        assert {frame.domain for frame in frames} == {expected}
        assert all(0.5 <= frame.domain_confidence <= 1 for frame in frames)
        chosen = list(track_video(gated, processor, video.frames, prompts, domain=expected))
        assert chosen[0].domain_confidence is None
        assert all(torch.equal(a.logits, b.logits) for a, b in zip(frames, chosen, strict=True))
        if expected is None:
            plain = list(track_video(base, processor, video.frames, prompts))
            assert all(torch.equal(a.logits, b.logits) for a, b in zip(frames, plain, strict=True))


def test_most_held_out_videos_go_to_their_domain(gated, processor, videos):
    for kind, expected in {"blobs": "a", "stripes": "b", "shapes": None}.items():
        held_out = SyntheticVideos(10, 1, domain=kind, seed=77)
        decided = [decision.domain for decision in decide_videos(gated, processor, held_out)]
        assert decided.count(expected) >= 9


def test_a_user_overrules_the_gate_in_the_middle_of_a_video(gated, processor, videos):
    video = videos["blobs"][22]
    session = VideoSession(video.frames, processor)
    processor.add_inputs_to_inference_session(session, 0, 1, input_masks=video.masks(0, video.visible(0))[0])
    assert gated(session, frame_idx=0).domain == "a"
    session.domain = None
    output = gated(session, frame_idx=1)
    assert output.domain is None and output.get("domain_confidence") is None
    assert gated(session, frame_idx=2, domain="b").domain == "b" and session.domain == "b"
    with pytest.raises(ValueError, match=r"`domain` must be \"auto\", None or a domain of the model \('a', 'b'\)"):
        gated(session, frame_idx=2, domain="c")


def test_experts_in_the_image_encoder_alone_have_an_effect(batch, processor, videos):
    model = new_model()
    add_learned_domain(model, "e", 4, expert_modules=["qkv"])
    add_learned_domain(model, "other", 5, expert_modules=["q_proj"])
    alone, plain = masks(model, batch, "e"), masks(model, batch, None)
    assert not torch.equal(alone, plain)
    torch.testing.assert_close(masks(model, batch, ["other", "e"])[1], alone[1], rtol=1e-4, atol=1e-4)
    video = videos["blobs"][20]
    prompt = VideoPrompt(1, mask=video.masks(0, video.visible(0))[0])
    # The first frame's mask is the prompt.
    later = [list(track_video(model, processor, video.frames, [prompt], domain=d))[1].logits for d in ("e", None)]
    assert not torch.equal(*later)


def test_frames_that_were_encoded_for_another_domain_are_encoded_anew(gated, processor, videos):
    """Experts of `b` are in the encoder; a session that caches more frames has encoded frame 2 for the base."""
    video, masks_of_frame_2 = videos["blobs"][22], []
    for size in (1, 3):
        session = VideoSession(video.frames, processor, domain=None, max_vision_features_cache_size=size)
        processor.add_inputs_to_inference_session(session, 0, 1, input_masks=video.masks(0, video.visible(0))[0])
        for frame_idx, domain in enumerate((None, None, "b")):
            session.domain = domain
            output = gated(session, frame_idx=frame_idx)
        masks_of_frame_2.append(output.pred_masks)
    torch.testing.assert_close(*masks_of_frame_2, rtol=1e-4, atol=1e-4)


def test_a_video_that_changes_its_look_is_decided_anew_if_asked_for(gated, processor, videos):
    first, second = videos["blobs"][22], videos["stripes"][22]
    frames = [*(first.frames[t] for t in range(3)), *(second.frames[t] for t in range(3))]
    frames = [frame if frame.ndim == 3 else frame[..., None].repeat(3, -1) for frame in map(_array, frames)]
    found = {}
    for interval in (None, 2):
        session = VideoSession(frames, processor, domain_interval=interval)
        processor.add_inputs_to_inference_session(session, 0, 1, input_masks=first.masks(0, first.visible(0))[0])
        found[interval] = [gated(session, frame_idx=t).domain for t in range(6)]
    assert found[None] == ["a"] * 6
    assert found[2] == ["a"] * 4 + ["b"] * 2
    with pytest.raises(ValueError, match="`domain_interval` must be at least 1"):
        VideoSession(frames, processor, domain_interval=0)


def _array(frame):
    return frame if hasattr(frame, "ndim") else frame.numpy()


def test_sessions_of_different_domains_are_tracked_together(gated, processor, videos):
    def sessions():
        for kind in ("blobs", "stripes", "shapes"):
            session = VideoSession(videos[kind][23].frames, processor)
            ids = videos[kind][23].visible(0)
            for i, mask in zip(ids, videos[kind][23].masks(0, ids), strict=True):
                processor.add_inputs_to_inference_session(session, 0, i, input_masks=mask)
            yield session

    together, apart = list(sessions()), list(sessions())
    for t in range(3):
        outputs = gated.track_together(together, t)
        assert [output.domain for output in outputs] == ["a", "b", None]
        for output, session in zip(outputs, apart, strict=True):
            torch.testing.assert_close(output.pred_masks, gated(session, frame_idx=t).pred_masks, rtol=1e-3, atol=1e-3)


def test_two_threads_track_in_different_domains(gated, processor, videos):
    def track(domain, results):
        video = videos["blobs"][20]
        prompt = VideoPrompt(1, mask=video.masks(0, video.visible(0))[0])
        results[domain] = [x.logits for x in track_video(gated, processor, video.frames, [prompt], domain=domain)]

    expected, found = {}, {}
    for domain in ("a", "b", None):
        track(domain, expected)
    threads = [threading.Thread(target=track, args=(domain, found)) for domain in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for domain, logits in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(logits, found[domain], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same(gated, batch, tmp_path, dtype):
    gated.save_pretrained(tmp_path)
    loaded = SamoeModel.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.config.domains == gated.config.domains
    gate = {name: t for name, t in gated.state_dict().items() if name.startswith("domain_gate.")}
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in gate.items())
    assert len(gate) == 5 and loaded.dtype == dtype
    if dtype == torch.float32:
        assert loaded.state_dict().keys() == gated.state_dict().keys()
        assert all(torch.equal(masks(loaded, batch, name), masks(gated, batch, name)) for name in ("a", "b", None))


def test_what_was_trained_is_saved_alone_and_grows_by_domain(base, batch, tmp_path, processor, videos):
    """As people do who add to each other's work: base, then a's author, then b's."""
    base.save_pretrained(tmp_path / "base")
    for number, (name, kind) in enumerate((("a", "blobs"), ("b", "stripes"))):
        source = tmp_path / ("base" if number == 0 else "a")
        model = SamoeModel.from_pretrained(source)
        add_learned_domain(model, name, number, expert_modules=ENCODER_AND_MEMORY)
        fit_gate(model, processor, name, videos[kind], show_progress_bar=False)
        model.save_pretrained(tmp_path / name, experts_only=True)
    loaded = SamoeModel.from_pretrained(tmp_path / "b")
    assert loaded.config.domain_names == ["a", "b"]
    size = (tmp_path / "b" / "model.safetensors").stat().st_size
    assert size < 0.5 * (tmp_path / "base" / "model.safetensors").stat().st_size
    for name in ("a", "b", None):
        assert torch.equal(masks(loaded, batch, name), masks(model, batch, name))
    assert torch.equal(masks(loaded, batch, None), masks(base, batch, None))


def test_a_file_that_contradicts_its_domains_is_refused(tmp_path):
    model = with_two_domains()
    model.origin.source = {"name_or_path": "x/y"}
    new_model().save_pretrained(tmp_path / "base")
    model = SamoeModel.from_pretrained(tmp_path / "base")
    add_learned_domain(model, "a", 0)
    model.save_pretrained(tmp_path / "trained", experts_only=True)
    path = tmp_path / "trained" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"name": "a"', '"name": "z"'))
    with pytest.raises(ValueError, match=r"trained builds on .*base, which it does not fit"):
        SamoeModel.from_pretrained(tmp_path / "trained")
    path.write_text(text.replace('"num_experts": 4', '"num_experts": 5'))
    with pytest.raises(ValueError, match=r"trained builds on .*base, which it does not fit"):
        SamoeModel.from_pretrained(tmp_path / "trained")


def test_domains_are_removed_and_renamed(gated, batch, processor, videos):
    model = copy.deepcopy(gated)
    expected = masks(model, batch, "b")
    remove_domain(model, "a")
    rename_domain(model, "b", "type")  # a name that modules have an attribute of
    assert torch.equal(masks(model, batch, "type"), expected)
    assert model.config.domain_names == ["type"]
    assert not any("domain_a" in name or "domain_b" in name for name in model.state_dict())
    video = videos["stripes"][23]
    assert next(decide_videos(model, processor, [video])).domain == "type"
    remove_domain(model, "type")
    assert model.state_dict().keys() - {n for n in model.state_dict() if n.startswith("domain_gate")} == {
        name for name in new_model().state_dict() if "lora_" not in name and "router" not in name
    }
    for change in (lambda name: remove_domain(model, name), lambda name: rename_domain(model, name, "x")):
        with pytest.raises(ValueError, match="The model has no domain 'a'; there are none"):
            change("a")


def test_two_peoples_domains_are_put_side_by_side(gated, batch, processor, videos):
    mine, yours = copy.deepcopy(gated), copy.deepcopy(gated)
    remove_domain(mine, "b")
    remove_domain(yours, "a")
    assert merge_domains(mine, yours) == ["b"]
    for name in ("a", "b", None):
        assert torch.equal(masks(mine, batch, name), masks(gated, batch, name))
    found = [next(decide_videos(mine, processor, [videos[kind][23]])).domain for kind in ("blobs", "stripes")]
    assert found == ["a", "b"]
    with pytest.raises(ValueError, match="Both models have a domain 'b'"):
        merge_domains(mine, yours)
    rename_domain(yours, "b", "c")
    yours.mask_decoder.iou_token.weight.data += 1
    with pytest.raises(ValueError, match="different bases"):
        merge_domains(mine, yours)
    assert mine.config.domain_names == ["a", "b"]


def test_experts_of_no_domain_become_a_domain(batch):
    model = new_model()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    expected, tensors = masks(model, batch, None), len(model.state_dict())
    with pytest.raises(ValueError, match=r"`rename_domain\(None, NAME\)` makes a domain of them"):
        add_domain(model, "new")
    rename_domain(model, None, "old")
    assert torch.equal(masks(model, batch, "old"), expected)
    assert torch.equal(masks(model, batch, None), masks(new_model(), batch, None))
    assert len(model.state_dict()) == tensors + 5
    add_domain(model, "new", like="old")
    assert torch.equal(masks(model, batch, "new"), expected)


def test_a_new_domain_starts_from_experts_of_the_same_kind_alone(model, batch):
    model = copy.deepcopy(model)
    add_domain(model, "like_a", like="a")
    settings = {name: value for name, value in model.config.domains[0].items() if name != "name"}
    add_domain(model, "new", **settings)
    add_domain(model, "smaller", **{**settings, "lora_rank": 1})
    assert not torch.equal(masks(model, batch, "new"), masks(model, batch, "a"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not copy_domain_experts(model, "a", "smaller") and not copy_domain_experts(model, "a", "like_a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert copy_domain_experts(model, "a", "new") and not copy_domain_experts(model, "new", "new")
    assert torch.equal(masks(model, batch, "new"), masks(model, batch, "a"))
    with pytest.raises(ValueError, match="The model has no domain 'z'"):
        copy_domain_experts(model, "z", "new")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a", {}, "is the name of a domain that the model has"),
        ("auto", {}, "be none of auto, none, base"),
        ("x.y", {}, "must be of letters, digits, _ and -"),
        (5, {}, "must be of letters"),
        ("c", {"num_experts": 2, "num_experts_per_tok": 3}, r"Domain 'c': `num_experts_per_tok` must be at most"),
        ("c", {"num_experts": -1}, "`num_experts` must be an integer of at least 1"),
        ("c", {"lora_alpha": float("inf")}, "Domain 'c': `lora_alpha` must be a number above 0"),
        ("c", {"expert_modules": ["nothing"]}, "matches no linear layer"),
        ("c", {"rank": 2}, "`settings` must be among"),
        ("c", {"like": "z"}, "The model has no domain 'z'"),
        ("c", {"like": "a", "lora_rank": 2}, "`like` 'a' says what"),
    ],
)
def test_domains_that_cannot_be_are_refused_and_nothing_changes(model, name, settings, message):
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_domain(model, name, **settings)
    assert set(model.state_dict()) == before and model.config.domain_names == ["a", "b"]


@pytest.mark.parametrize("domains", [5, ["a"], [{"name": "a"}], {"a": {}}])
def test_configurations_with_wrong_domains_are_refused(domains):
    with pytest.raises(ValueError, match="domains"):
        SamoeConfig(domains=domains).check_experts()


def test_a_domain_may_have_no_experts(batch, base):
    model = new_model()
    add_domain(model, "plain", num_experts=0)
    assert torch.equal(masks(model, batch, "plain"), masks(base, batch, None))
    assert model.expert_module_names == []


def test_surgery_on_single_experts_is_for_models_without_domains(model):
    for change in (
        lambda: prune_experts(model, keep=[0]),
        lambda: merge_experts(model, [0, 1]),
        lambda: grow_experts(model, 1),
        lambda: reset_expert(model, 0),
        lambda: freeze_experts(model, [0]),
        lambda: replace_experts(model, lora_rank=2),
        lambda: add_expert(model, "x/y"),
    ):
        with pytest.raises(ValueError, match="belong to domains"):
            change()


def test_an_adapter_of_peft_goes_around_layers_with_domains(batch, tmp_path):
    model = with_two_domains()
    expected = masks(model, batch, "b")
    model.add_adapter(LoraConfig(target_modules="all-linear", r=2))
    torch.testing.assert_close(masks(model, batch, "b"), expected, rtol=0, atol=1e-5)  # other products, the same sum
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    changed = masks(model, batch, "b")
    assert not torch.equal(changed, expected)
    model.save_pretrained(tmp_path)
    loaded = SamoeModel.from_pretrained(tmp_path)
    torch.testing.assert_close(masks(loaded, batch, "b"), changed, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="has adapters of PEFT"):
        add_domain(loaded, "c")


def test_a_lora_of_peft_becomes_a_domain_and_back(batch, tmp_path):
    model = with_two_domains()
    add_domain(model, "one", num_experts=1, num_experts_per_tok=1, lora_rank=2, expert_modules=ENCODER_AND_MEMORY)
    for _, experts in domain_modules(model, "one"):
        torch.nn.init.normal_(experts.lora_B, std=0.1)
    export_expert(model, 0, tmp_path / "lora", domain="one")
    other = new_model()
    add_lora_domain(other, "mine", tmp_path / "lora")
    torch.testing.assert_close(masks(other, batch, "mine"), masks(model, batch, "one"), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`expert` must be integers from 0 to 0"):
        export_expert(model, 1, tmp_path / "more", domain="one")
    with pytest.raises(ValueError, match="belong to domains"):
        export_expert(model, 0, tmp_path / "more")


def test_the_original_has_no_place_for_domains(model, tmp_path):
    with pytest.raises(ValueError, match=r"a model with domains \(a, b\) cannot be written"):
        save_original(model.config, model.state_dict(), tmp_path / "original")
    assert not list(tmp_path.iterdir())


def test_usage_is_of_the_experts_that_ran(gated, processor, videos):
    usage = expert_usage(gated, [videos["blobs"][20], videos["stripes"][20]], processor, show_progress_bar=False)
    owners = {name: {source.domain for source in sources} for name, sources in usage.sums.items()}
    assert {name.rpartition(".domain_")[2] for name in owners} == {"a", "b"}
    for name, data_domains in owners.items():
        assert data_domains == {"blobs" if name.endswith("domain_a") else "stripes"}


def test_what_experts_do_is_drawn_for_each_domain(gated, processor, videos, tmp_path):
    """Domains have mixtures of different sizes, and a picture is of the one that a video was given."""
    own = [videos["blobs"][20], videos["stripes"][20]]
    usage = expert_usage(gated, own, processor, show_progress_bar=False)
    last = [name for name in usage.modules if "layers.1.cross_attn_image.q_proj" in name]
    assert len(last) == 2
    usage.sums = {name: usage.sums[name] for name in last}
    files = usage.save(tmp_path)
    assert {file.suffix for file in files} == {".csv", ".json", ".png"}
    for video, domain, num_experts in zip(own, "ab", (3, 4), strict=True):
        maps = routing_maps(gated, video, processor)
        assert maps.module.endswith(f".q_proj.domain_{domain}") and maps.num_experts == num_experts
        assert (maps.experts >= 0).any() and maps.experts.max() < num_experts
    with pytest.raises(ValueError, match="belongs to no domain"):
        routing_maps(gated, videos["shapes"][20], processor)


def test_what_three_domains_of_base_plus_take_on_the_hub():
    settings = yaml.safe_load((ROOT / "configs" / "model_base_plus.yaml").read_text())
    config = SamoeConfig(**settings)
    own = {name: getattr(config, name) for name in EXPERT_SETTINGS}
    config.domains = [{"name": name, **own} for name in ("a", "b", "c")]
    tensors = build_on_meta(config).state_dict()
    saved = {name: x for name, x in tensors.items() if is_expert_parameter(name)}
    assert sum(x.numel() * x.element_size() for x in saved.values()) < 8.2e6
    assert any(name.startswith("domain_gate.") for name in saved)


def test_router_logits_are_of_the_experts_that_ran(model, batch):
    with torch.no_grad(), record_router_logits(model) as calls, use_domain("a"):
        model(*batch, domain="a")
    ran = {name for name, logits in calls.items() if logits}
    assert ran and all(name.endswith(".domain_a") for name in ran)


@pytest.mark.slow
def test_compiled_it_gives_the_same_in_all_domains(gated, processor, videos):
    compiled = copy.deepcopy(gated)
    # Which experts are run is decided while code is traced; what is made of it then is the same for all models.
    compiled.compile_for_tracking(backend="eager")
    video = videos["blobs"][20]
    prompt = VideoPrompt(1, mask=video.masks(0, video.visible(0))[0])
    for domain in ("a", "b", None, "a"):
        expected, found = (
            [x.logits for x in track_video(one, processor, video.frames, [prompt], domain=domain)]
            for one in (gated, compiled)
        )
        for a, b in zip(expected, found, strict=True):
            assert (a - b).abs().mean() < 1e-3
