"""Experts of domains: whose are run, that others do not change, and that they survive saving."""

import copy
import threading

import pytest
import torch
from accelerate import load_checkpoint_and_dispatch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from helpers.domains import ENCODER_AND_MEMORY, add_learned_domain, clip_masks, new_model, with_two_domains
from helpers.reference import assert_same_tensors
from samoe_hf import SamoeModel, VideoSession
from samoe_hf.analysis.routing import routing_maps
from samoe_hf.analysis.usage import expert_usage
from samoe_hf.continual.fit_gate import fit_gate
from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt, track_video
from samoe_hf.model.domain_choice import decide_domains
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.model.domain_gate import NO_DOMAIN, DomainGate, GateDecision
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import add_domain, merge_domains, rename_domain

DOMAIN_OF = {"blobs": "a", "stripes": "b", "shapes": None}  # what the gate knows


@pytest.fixture(scope="module")
def base() -> SamoeModel:
    return new_model()


@pytest.fixture(scope="module")
def processor(base):
    return build_processor(base.config)


def prompts_of(video):
    ids = video.visible(0)
    return [VideoPrompt(i, mask=mask) for i, mask in zip(ids, video.masks(0, ids), strict=True)]


def track(model, processor, video, domain="auto"):
    return list(track_video(model, processor, video.frames, prompts_of(video), domain=domain))


def start(frames, processor, video, **options):
    session = VideoSession(frames, processor, **options)
    for prompt in prompts_of(video):
        processor.add_inputs_to_inference_session(session, 0, prompt.object_id, input_masks=prompt.mask)
    return session


def same_logits(a, b):
    return all(torch.equal(x.logits, y.logits) for x, y in zip(a, b, strict=True))


def gradients(model, *calls):
    """Of clips and their labels with a domain or domains each."""
    model.zero_grad()
    for clips, labels, domain in calls:
        (model(clips, labels, domain=domain).loss * len(clips)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_clip_of_no_domain_gets_the_base_output_to_the_bit(base, gated, two_clips):
    expected = clip_masks(base, two_clips, None)
    assert torch.equal(clip_masks(gated, two_clips, None), expected)
    assert not torch.equal(clip_masks(gated, two_clips, "a"), expected)
    assert not torch.equal(clip_masks(gated, two_clips, "b"), clip_masks(gated, two_clips, "a"))


@pytest.mark.parametrize("domains", [["a", "a"], ["a", None, "b", "a"]])
def test_clips_of_different_domains_in_one_batch_give_what_each_gives_alone(gated, two_clips, domains):
    frames = torch.randn(len(domains), *two_clips[0].shape[1:], generator=torch.Generator().manual_seed(1))
    labels, losses = two_clips[1][:1].expand(len(domains), -1, -1, -1, -1), []
    with torch.no_grad():
        together = gated(frames, labels, domain=domains)
        assert together.domains == domains
        for row, domain in enumerate(domains):
            one = gated(frames[row : row + 1], labels[:1], domain=domain)
            torch.testing.assert_close(together.pred_masks[row], one.pred_masks[0], rtol=1e-4, atol=1e-4)
            losses.append(one.loss)
    torch.testing.assert_close(together.loss, sum(losses) / len(losses), rtol=1e-4, atol=1e-4)


def test_gradients_of_a_mixed_batch_are_those_of_its_clips_also_with_checkpointing(two_clips):
    model, (frames, labels) = with_two_domains().train(), two_clips
    model.set_trainable("experts")
    apart = gradients(model, (frames[:1], labels[:1], "b"), (frames[1:], labels[1:], "a"))
    for _ in range(2):
        mixed = gradients(model, (frames, labels, ["b", "a"]))
        assert mixed.keys() == apart.keys() and len(mixed) > 20
        for name, gradient in mixed.items():
            torch.testing.assert_close(gradient, apart[name], rtol=1e-3, atol=2e-4)
        model.gradient_checkpointing_enable()


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        pytest.param(lambda parameters, **o: torch.optim.SGD(parameters, momentum=0.9, **o), marks=pytest.mark.slow),
    ],
)
def test_training_a_domain_changes_no_bit_of_others(two_clips, optimizer):
    model = with_two_domains()
    trained = optimizer(model.parameters(), lr=0.1, weight_decay=0.5)

    def step(*domains):
        model.train().set_trainable(*(f"domain:{name}" for name in domains))
        for domain in domains:
            model(*two_clips, domain=domain).loss.backward()
        trained.step()
        trained.zero_grad()
        model.eval()

    step("a", "b")  # gives momentum to both
    before = copy.deepcopy(model.state_dict())
    expected = {domain: clip_masks(model, two_clips, domain) for domain in (None, "a")}
    step("b")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".domain_b." in name for name in changed)
    assert all(torch.equal(clip_masks(model, two_clips, domain), x) for domain, x in expected.items())


def test_the_gate_decides_for_a_session_and_says_how_sure_it_is(gated, base, processor, domain_videos):
    for kind, expected in DOMAIN_OF.items():
        frames = track(gated, processor, domain_videos[kind][21])
        assert {frame.domain for frame in frames} == {expected}
        assert all(0.5 <= frame.domain_confidence <= 1 for frame in frames)
        chosen = track(gated, processor, domain_videos[kind][21], expected)
        assert chosen[0].domain_confidence is None and same_logits(frames, chosen)
    assert same_logits(frames, track(base, processor, domain_videos["shapes"][21]))


def test_domains_that_look_alike_are_told_with_their_likelihoods(gated, processor, domain_videos):
    model, videos = copy.deepcopy(gated), domain_videos["blobs"]
    add_domain(model, "like_a", num_experts=0)
    fit_gate(model, processor, "like_a", [videos[i] for i in range(0, 24, 2)], show_progress_bar=False)
    rivals = [track(model, processor, videos[i]) for i in range(6)]
    told = [frames[0] for frames in rivals if frames[0].domain_rivals]
    assert told
    for frame in told:
        assert set(frame.domain_rivals) == {"a", "like_a"} and next(iter(frame.domain_rivals)) == frame.domain
        assert 0.9 < sum(frame.domain_rivals.values()) <= 1.001
    for video, domain in ((domain_videos["stripes"][20], "auto"), (videos[0], "a")):
        assert track(model, processor, video, domain)[0].domain_rivals is None


def halved(model):
    """A copy in which domains add half of what they do."""
    model = copy.deepcopy(model)
    for name in model.config.domain_names:
        for _, experts in domain_modules(model, name):
            experts.lora_B.data *= 0.5
    return model


def with_one_expert(model):
    """Its gate, and domains whose experts become part of their layers' weights where a video is propagated."""
    one = new_model()
    for seed, name in enumerate(model.config.domain_names):
        add_learned_domain(one, name, seed, num_experts=1, num_experts_per_tok=1, expert_modules=ENCODER_AND_MEMORY)
    one.domain_gate.load_state_dict(model.domain_gate.state_dict())
    return one


@pytest.mark.parametrize("kind", ["several experts", "one expert"])
def test_a_stranger_gets_the_experts_of_the_likeliest_domain_or_half_of_them_where_asked_for(
    gated, processor, domain_videos, two_clips, kind
):
    model = copy.deepcopy(gated) if kind == "several experts" else with_one_expert(gated)
    stranger, known = domain_videos["shapes"][21], domain_videos["blobs"][21]
    base, experts, half = track(model, processor, stranger), [], halved(model)
    assert {frame.domain for frame in base} == {None} and {frame.domain_unknown for frame in base} == {None}
    for unknown, same in (("nearest", model), ("mix", half)):
        frames = list(track_video(model, processor, stranger.frames, prompts_of(stranger), unknown=unknown))
        assert {frame.domain_unknown for frame in frames} == {unknown}
        assert all(0 < frame.domain_confidence < 0.5 for frame in frames)
        assert same_logits(frames, track(same, processor, stranger, frames[0].domain))
        assert not same_logits(frames, base)
        model.config.unknown = unknown  # of all sessions and clips that do not say otherwise
        assert same_logits(frames, track(model, processor, stranger))
        of_known = track(model, processor, known)
        assert same_logits(of_known, track(model, processor, known, "a")) and of_known[0].domain_unknown is None
        with torch.no_grad():
            domains = model(*two_clips, domain="auto").domains
        assert all(domains) and torch.equal(clip_masks(model, two_clips, "auto"), clip_masks(same, two_clips, domains))
        experts.append(frames)
    assert not same_logits(*experts)


def test_the_nearest_domain_is_found_among_many_and_there_is_none_before_the_gate_knows_one(monkeypatch):
    model, frames = new_model(), torch.zeros(1, 3, 128, 128)
    for index in range(30):
        add_domain(model, f"d{index}", num_experts=0)
    (nothing,) = decide_domains(model, frames, None)
    assert nothing.by("nearest") is nothing and nothing.domain is None
    likelihoods = torch.full((1, 30), 0.03)  # what is less likely than 5 % is no rival
    stranger = GateDecision(torch.tensor([NO_DOMAIN]), torch.tensor([0.75]), 3 * likelihoods, likelihoods)
    monkeypatch.setattr(model.domain_gate, "decide", lambda _: stranger)
    for likeliest in (0.13, 0.04):
        likelihoods[0, 7] = likeliest
        (decision,) = decide_domains(model, frames, None)
        assert decision.domain is None and decision.by("base") is decision
        assert (nearest := decision.by("nearest")).domain == "d7" and nearest.confidence == 0.25


def test_what_a_stranger_gets_can_be_changed_at_any_time(gated, processor, domain_videos):
    video = domain_videos["shapes"][21]
    session = start(video.frames, processor, video, unknown="mix")
    gated(session, frame_idx=0)
    told = []
    for unknown in ("mix", "nearest", "base", None):
        session.unknown = unknown
        told.append((output := gated(session, frame_idx=1)).domain_unknown)
        assert (output.domain is None) == (output.domain_unknown is None) == (output.domain_confidence > 0.5)
    assert told == ["mix", "nearest", None, None]
    with pytest.raises(ValueError, match=r"`unknown` must be one of 'base', 'nearest', 'mix' or None, got 'far'"):
        start(video.frames, processor, video, unknown="far")


def test_a_user_overrules_the_gate_in_the_middle_of_a_video(gated, processor, domain_videos):
    video = domain_videos["blobs"][22]
    session = start(video.frames, processor, video)
    assert gated(session, frame_idx=0).domain == "a"
    session.domain = None
    output = gated(session, frame_idx=1)
    assert output.domain is None and output.get("domain_confidence") is None
    assert gated(session, frame_idx=2, domain="b").domain == "b" and session.domain == "b"
    with pytest.raises(ValueError, match=r"`domain` must be \"auto\", None or a domain of the model \('a', 'b'\)"):
        gated(session, frame_idx=2, domain="c")


def test_frames_that_were_encoded_for_another_domain_are_encoded_anew(gated, processor, domain_videos):
    """Experts of `b` are in the encoder; a session that caches more frames has encoded frame 2 for the base."""
    video, masks_of_frame_2 = domain_videos["blobs"][22], []
    for size in (1, 3):
        session = start(video.frames, processor, video, domain=None, max_vision_features_cache_size=size)
        for frame_idx, domain in enumerate((None, None, "b")):
            session.domain = domain
            output = gated(session, frame_idx=frame_idx)
        masks_of_frame_2.append(output.pred_masks)
    torch.testing.assert_close(*masks_of_frame_2, rtol=1e-4, atol=1e-4)


def test_frames_that_were_encoded_with_half_of_the_experts_are_encoded_anew(gated, processor, domain_videos):
    """Frame 2 was encoded ahead where the session caches more frames."""
    model, video, masks_of_frame_2 = with_one_expert(gated), domain_videos["shapes"][21], []
    for size in (1, 3):
        session = start(video.frames, processor, video, max_vision_features_cache_size=size)
        for frame_idx, session.unknown in enumerate(("mix", "mix", "nearest")):
            output = model(session, frame_idx=frame_idx)
        masks_of_frame_2.append(output.pred_masks)
    torch.testing.assert_close(*masks_of_frame_2, rtol=1e-4, atol=1e-4)


def test_a_video_that_changes_its_look_is_decided_anew_if_asked_for(gated, processor, domain_videos):
    first, second = domain_videos["blobs"][22], domain_videos["stripes"][22]
    frames = [video.frames[t] for video in (first, second) for t in range(3)]
    for interval, expected in ((None, ["a"] * 6), (2, ["a"] * 4 + ["b"] * 2)):
        session = start(frames, processor, first, domain_interval=interval)
        assert [gated(session, frame_idx=t).domain for t in range(6)] == expected
        session.reset_tracking_data()
        for frame_idx, domain in ((5, "b"), (0, "b")):
            processor.add_inputs_to_inference_session(
                session, frame_idx, 1, input_points=[[[[60, 60]]]], input_labels=[[[1]]]
            )
            assert interval or gated(session, frame_idx=frame_idx).domain == domain
    with pytest.raises(ValueError, match="`domain_interval` must be at least 1"):
        VideoSession(frames, processor, domain_interval=0)


def test_sessions_of_different_domains_are_tracked_together(gated, processor, domain_videos):
    videos = [domain_videos[kind][23] for kind in DOMAIN_OF]
    together, apart = ([start(video.frames, processor, video) for video in videos] for _ in range(2))
    for t in range(3):
        outputs = gated.track_together(together, t)
        assert [output.domain for output in outputs] == [*DOMAIN_OF.values()]
        for output, session in zip(outputs, apart, strict=True):
            torch.testing.assert_close(output.pred_masks, gated(session, frame_idx=t).pred_masks, rtol=1e-3, atol=1e-3)


def test_two_threads_track_in_different_domains(gated, processor, domain_videos):
    expected, found = {}, {}

    def run(domain, results):
        results[domain] = track(gated, processor, domain_videos["blobs"][20], domain)

    for domain in DOMAIN_OF.values():
        run(domain, expected)
    threads = [threading.Thread(target=run, args=(domain, found)) for domain in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_logits(frames, found[domain]) for domain, frames in expected.items())


def assert_same_gate_in(dtype, folder, model):
    own = model.state_dict()
    SamoeModel.from_pretrained(folder, dtype=dtype).save_pretrained(folder / "again")
    loaded = SamoeModel.from_pretrained(folder / "again", dtype=dtype)
    gate = {name: x for name, x in loaded.state_dict().items() if name.startswith("domain_gate.")}
    assert loaded.dtype == dtype and len(gate) == 13
    assert all(torch.equal(x, own[name]) and x.dtype == own[name].dtype for name, x in gate.items())


def test_saved_and_loaded_it_is_the_same(gated, two_clips, tmp_path):
    gated.save_pretrained(tmp_path)
    loaded = SamoeModel.from_pretrained(tmp_path)
    assert loaded.config.domains == gated.config.domains
    assert_same_tensors(loaded, gated)
    for name in ("a", "b", None):
        assert torch.equal(clip_masks(loaded, two_clips, name), clip_masks(gated, two_clips, name))
    assert_same_gate_in(torch.float16, tmp_path, gated)
    assert_known_without_further_features(tmp_path, gated)


def test_a_folder_whose_own_tensors_alone_were_read_into_a_model_gives_no_masks_of_its_domains(
    gated, two_clips, tmp_path
):
    gated.save_pretrained(tmp_path)
    model = load_checkpoint_and_dispatch(SamoeModel(gated.config), tmp_path, device_map={"": "cpu"}).eval()
    assert torch.equal(clip_masks(model, two_clips, None), clip_masks(gated, two_clips, None))  # the base's are right
    for mode in (False, True):
        with pytest.raises(InputError, match=r"'a'.*from_pretrained"):
            model.train(mode)(*two_clips, domain="a")
    for _, experts in domain_modules(model, "b"):
        torch.nn.init.normal_(experts.lora_B)
    model.eval()(*two_clips, domain="b")  # has been made otherwise

    new = SamoeModel(gated.config)  # of which nothing was read
    new.train()(*two_clips, domain="a").loss.backward()
    model.load_state_dict(gated.state_dict())
    assert torch.equal(clip_masks(model, two_clips, "a"), clip_masks(gated, two_clips, "a"))


def test_what_was_trained_is_saved_alone_and_grows_by_domain(base, two_clips, tmp_path, processor, domain_videos):
    """As people do who add to each other's work: base, then a's author, then b's."""
    base.save_pretrained(tmp_path / "base")
    for number, (source, name, kind) in enumerate((("base", "a", "blobs"), ("a", "b", "stripes"))):
        model = SamoeModel.from_pretrained(tmp_path / source)
        add_learned_domain(model, name, number, expert_modules=ENCODER_AND_MEMORY)
        fit_gate(model, processor, name, [domain_videos[kind][i] for i in range(4)], show_progress_bar=False)
        model.save_pretrained(tmp_path / name, experts_only=True)
    loaded = SamoeModel.from_pretrained(tmp_path / "b")
    assert loaded.config.domain_names == ["a", "b"]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("b", "base")]
    assert sizes[0] < 0.5 * sizes[1]
    for name in ("a", "b", None):
        assert torch.equal(clip_masks(loaded, two_clips, name), clip_masks(model, two_clips, name))
    assert torch.equal(clip_masks(loaded, two_clips, None), clip_masks(base, two_clips, None))
    assert_same_gate_in(torch.float64, tmp_path / "b", loaded)
    assert_known_without_further_features(tmp_path / "b", loaded)


def test_domains_are_changed_over_a_base_that_has_domains_itself(gated, two_clips, tmp_path):
    gated.save_pretrained(tmp_path / "base")
    model = SamoeModel.from_pretrained(tmp_path / "base")
    rename_domain(model, "a", "c")
    model.save_pretrained(tmp_path / "renamed", experts_only=True)
    loaded = SamoeModel.from_pretrained(tmp_path / "renamed")
    assert_same_tensors(loaded, model)
    for name, before in (("c", "a"), ("b", "b"), (None, None)):
        assert torch.equal(clip_masks(loaded, two_clips, name), clip_masks(gated, two_clips, before))
    assert_known_without_further_features(tmp_path / "renamed", loaded)


def assert_known_without_further_features(folder, model):
    """A file as older versions wrote it is loaded, and its gate decides by the features that there were."""
    tensors = load_file(folder / "model.safetensors")
    older = {name: tensor for name, tensor in tensors.items() if not name.startswith("domain_gate.further_")}
    assert len(older) == len(tensors) - 7
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, gate = SamoeModel.from_pretrained(folder), model.domain_gate
    own, before = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(own[name], before[name]) for name in older)
    rows = gate.means.new_zeros(len(gate), gate.num_features)
    rows[:, : gate.means.shape[1]] = gate.means
    decided, without = loaded.domain_gate.decide(rows), DomainGate(gate.kinds, gate.domains)
    without.load_state_dict({name: buffer for name, buffer in gate.state_dict().items() if "further" not in name})
    assert all(map(torch.equal, decided, without.decide(gate.means)))


def test_a_file_that_contradicts_its_domains_is_refused(base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    model = SamoeModel.from_pretrained(tmp_path / "base")
    add_domain(model, "a")
    model.save_pretrained(tmp_path / "trained", experts_only=True)
    path = tmp_path / "trained" / "config.json"
    text = path.read_text()
    for old, new, message in (
        ('"name": "a"', '"name": "z"', r"trained has no domains/z\.safetensors"),
        ('"num_experts": 4', '"num_experts": 5', r"trained/domains/a\.safetensors holds tensors of"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises((OSError, ValueError), match=message):
            SamoeModel.from_pretrained(tmp_path / "trained")
    path.write_text(text.replace('"name": "a"', '"name": "z"'))
    (tmp_path / "trained" / "domains" / "a.safetensors").rename(tmp_path / "trained" / "domains" / "z.safetensors")
    with pytest.raises(InputError, match=r"trained contradicts its config\.json: domain_gate is of other .*, z\."):
        SamoeModel.from_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"trained has no model\.safetensors; expected what was trained on \S+base there"):
        SamoeModel.from_pretrained(tmp_path / "trained")


def test_an_adapter_of_peft_goes_around_layers_with_domains(two_clips, tmp_path):
    model = with_two_domains()
    expected = clip_masks(model, two_clips, "b")
    model.add_adapter(LoraConfig(target_modules="all-linear", r=2))
    # Other products, the same sum.
    torch.testing.assert_close(clip_masks(model, two_clips, "b"), expected, rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    changed = clip_masks(model, two_clips, "b")
    assert not torch.equal(changed, expected)
    model.save_pretrained(tmp_path)
    loaded = SamoeModel.from_pretrained(tmp_path)
    torch.testing.assert_close(clip_masks(loaded, two_clips, "b"), changed, rtol=0, atol=1e-5)
    for change in (lambda: add_domain(loaded, "c"), lambda: merge_domains(new_model(), loaded)):
        with pytest.raises(ValueError, match="has adapters of PEFT"):
            change()
    adapted = get_peft_model(with_two_domains(), LoraConfig(target_modules="all-linear", r=2))
    rename_domain(adapted.get_base_model(), "b", "c")
    torch.testing.assert_close(clip_masks(adapted.merge_and_unload(), two_clips, "c"), expected, rtol=0, atol=1e-5)


def test_what_experts_do_is_told_and_drawn_for_each_domain(gated, processor, domain_videos):
    """Domains have mixtures of different sizes, and a picture is of the one that a video was given."""
    own = [domain_videos["blobs"][20], domain_videos["stripes"][20]]
    usage = expert_usage(gated, own, processor, show_progress_bar=False)
    for name, sources in usage.sums.items():
        assert {source.domain for source in sources} == {"blobs" if name.endswith(".domain_a") else "stripes"}
    last = [name for name in usage.modules if "layers.1.cross_attn_image.q_proj" in name]
    assert [name.rpartition(".domain_")[2] for name in last] == ["a", "b"]
    for video, domain, num_experts in zip(own, "ab", (3, 4), strict=True):
        maps = routing_maps(gated, video, processor)
        assert maps.module.endswith(f".q_proj.domain_{domain}") and maps.num_experts == num_experts
        assert (maps.experts >= 0).any() and maps.experts.max() < num_experts
    with pytest.raises(ValueError, match="belongs to no domain"):
        routing_maps(gated, domain_videos["shapes"][20], processor)
