"""Benchmarks: what is compared is the same work, what is measured is what is reported."""

import copy
import json
import re
import runpy
import sys

import pytest
import torch

from benchmark import main
from experts import dense_forward
from helpers.reference import ROOT
from measure import Measurement, measure, peak_bytes, to_markdown
from memory import tracking_memory
from meta_order import PEERS, TransformersClip, without_dropout
from parts import Peaks, benchmark_attention, benchmark_parts
from peers import Sam2Tracker, TransformersTracker, base_of, sam2_of
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.expert_layer import ExpertLinear, expert_modules
from tracking import _check_equal
from training import benchmark_order, benchmark_training, example_clip

CPU = torch.device("cpu")


def test_the_dense_form_computes_the_same():
    layer = ExpertLinear(16, 24, num_experts=5, num_experts_per_tok=2, lora_rank=3, lora_alpha=2.0)
    torch.nn.init.normal_(layer.lora_B)
    tokens = torch.randn(2, 7, 16)
    torch.testing.assert_close(dense_forward(layer, tokens), layer(tokens), rtol=1e-4, atol=1e-5)


def test_contenders_take_turns_after_one_run_each():
    calls = []
    measurements = measure("case", {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU)
    assert "".join(calls) == "abababab"
    assert [(m.contender, len(m.seconds)) for m in measurements] == [("a", 3), ("b", 3)]


def test_peak_memory_is_that_of_tensors_held_at_once():
    def run():
        for _ in range(3):
            first = torch.ones(1 << 18)  # 1 MB
            second = first + 1
            del first, second

    assert 2 << 20 <= peak_bytes(run, CPU) < 3 << 20


def test_tables_give_ratios_to_the_reference():
    measurements = [
        Measurement("one", "ours", [0.2, 0.1, 0.3], 4 << 20),
        Measurement("one", "peer", [0.5, 0.5, 0.8], 8 << 20),
        Measurement("two", "peer", [0.1]),
    ]
    rows = [line.strip("| ").split(" | ") for line in to_markdown(measurements, "ours", "frame").splitlines()]
    assert rows[2] == ["one", "ours", "200.00", "100.00 to 300.00", "1.00", "5.00", "4.0", "1.00"]
    assert rows[3] == ["one", "peer", "500.00", "500.00 to 800.00", "2.50", "2.00", "8.0", "2.00"]
    assert rows[4][:5] == ["two", "peer", "100.00", "100.00 to 100.00", ""]


def track(tracker, frames, points):
    with torch.inference_mode():
        return torch.stack([masks for _, masks in tracker.track(frames, points)])


def test_peers_have_the_same_weights_and_give_the_same_masks(nano):
    generator = torch.Generator().manual_seed(0)
    frames, points = torch.randn(4, 3, 128, 128, generator=generator), torch.tensor([[40.0, 60.0], [90.0, 30.0]])
    experts = {n: p.clone() for n, p in nano.model.named_parameters() if n.endswith("lora_B")}
    model = base_of(nano.model)
    expected = track(TransformersTracker(model, nano.model.config), frames, points)
    assert expected.shape == (4, 2, 1, 32, 32)
    assert (track(TransformersTracker(nano.model, nano.model.config), frames, points) - expected).abs().mean() > 1e-3
    assert all(torch.equal(p, experts[n]) for n, p in nano.model.named_parameters() if n in experts)
    pytest.importorskip("sam2", reason="needs the `bench` extra")
    _check_equal({"transformers": expected, "sam2": track(Sam2Tracker(sam2_of(nano.model)), frames, points)})


def test_sam2_chooses_masks_as_its_own_predictor_does(nano):
    """`build_sam2_video_predictor` adds these settings to every YAML."""
    pytest.importorskip("sam2", reason="needs the `bench` extra")
    decoder = sam2_of(nano.model).sam_mask_decoder
    assert decoder.dynamic_multimask_via_stability
    assert decoder.dynamic_multimask_stability_delta == 0.05
    assert decoder.dynamic_multimask_stability_thresh == 0.98


def test_contenders_that_differ_are_not_timed():
    masks = torch.zeros(2, 1, 4, 4)
    with pytest.raises(AssertionError, match="b and a do not agree"):
        _check_equal({"a": masks, "b": masks + 0.5})


def test_a_training_step_and_its_parts_are_timed():
    config = SamoeConfig(**read_yaml(ROOT / "configs" / "model_micro.yaml"))
    measurements = benchmark_training(config, 2, 2, 1, CPU, torch.float32)
    assert [m.contender for m in measurements] == [
        "samoe_hf", "original's way", "encoder", "forward", "forward and backward"
    ]  # fmt: skip
    assert all(len(m.seconds) == 1 for m in measurements)


def test_parts_of_a_frame_are_beside_their_floors():
    config = SamoeConfig(**read_yaml(ROOT / "configs" / "model_micro.yaml"))
    parts = {part.measurement.case: part for part in benchmark_parts(config, 2, 1, CPU, torch.float32)}
    assert list(parts) == ["image encoder", "mask decoder", "memory encoder", "memory attention"]
    assert [part.frames for part in parts.values()] == [4, 1, 1, 1]
    attends = [any("scaled_dot_product" in kernel for kernel in part.kernels) for part in parts.values()]
    assert attends == [True, True, False, True]
    # Two objects; 64 positions, 7 maps and pointers of 8 frames in two tokens each; a head of 128; two layers.
    keys = 7 * 64 + 8 * 2
    attention = 2 * 2 * 4 * 64 * keys * 128
    projections = 2 * 2 * 2 * (2 * keys * 64 * 128)
    assert attention + projections < parts["memory attention"].flops < 3 * (attention + projections)
    # Weights are most of the decoder's data, and it reads each once.
    weights = 4 * sum(p.numel() for p in SamoeModel(config).mask_decoder.parameters())
    assert weights < parts["mask decoder"].bytes < 1.5 * weights
    one = parts["image encoder"]
    assert one.floors(Peaks(one.flops / 4, one.bytes / 8)) == (1.0, 2.0)
    names = {m.contender for m in benchmark_attention(config, 2, 1, CPU, torch.float32)}
    assert names == {"as chosen", "flash", "math"}


def run_script(monkeypatch, *arguments):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "benchmarks" / "benchmark.py"), run_name="__main__")


@pytest.mark.slow
def test_the_script_writes_tables_plots_and_times(monkeypatch, tmp_path, capsys):
    peers = ["--peers", "transformers"]
    run_script(monkeypatch, "track", *peers, "--objects", 1, 2, "--frames", 10, "--repeats", 1, "--output", tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"track.md", "track.json", "track.png"}
    times = json.loads((tmp_path / "track.json").read_text())["measurements"]
    assert [(m["case"], m["contender"]) for m in times] == [
        ("micro, 1 object", "samoe_hf"), ("micro, 1 object", "transformers"),
        ("micro, 2 objects", "samoe_hf"), ("micro, 2 objects", "transformers"),
    ]  # fmt: skip
    run_script(monkeypatch, "parts", "--repeats", 1, "--output", tmp_path)
    assert (tmp_path / "parts.md").read_text().count("\n| ") == 11 and (tmp_path / "parts.png").is_file()
    run_script(monkeypatch, "long", "--frames", 20, "--output", tmp_path)
    assert (tmp_path / "long.md").read_text().count("\n| ") == 22 and (tmp_path / "long.png").is_file()
    assert "torch" in capsys.readouterr().out


def test_the_trial_of_metas_order_of_work_computes_the_same(nano):
    """Its loss and gradients are those of our model without experts, which a test compares with the original's."""
    model = copy.deepcopy(nano.model).train()
    without_dropout(model)
    for _, module in expert_modules(model):
        torch.nn.init.zeros_(module.lora_B)
    model.set_trainable("all")
    clip = example_clip(model.config.image_size, 3, 2, CPU)
    peer = TransformersClip(model)
    peer.model.requires_grad_(True)
    ours, theirs = model(**clip, prompts="mask").loss, peer(clip["pixel_values"], clip["labels"])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for loss in (ours, theirs):
        loss.backward()
    compared = 0
    for name, parameter in peer.model.named_parameters():
        own = model.get_parameter(name).grad
        if parameter.grad is not None:
            assert (own - parameter.grad).norm() <= 1e-3 * own.norm() + 1e-5, name
            compared += 1
    assert compared > 200


def test_training_is_timed_beside_metas_order():
    measurements = benchmark_order(SamoeConfig(**read_yaml("model_nano")), ["transformers"], 3, 2, 1, CPU)
    contenders = {(m.case, m.contender) for m in measurements}
    assert ("everything trained", "Meta's order, transformers") in contenders and len(measurements) == 6
    assert ("encoder frozen", "samoe_hf, experts, cached features") in contenders
    assert all(len(m.seconds) == 1 and m.median > 0 for m in measurements)


@pytest.mark.slow
def test_the_trial_by_sam2s_modules_has_the_same_loss():
    pytest.importorskip("sam2")
    measurements = benchmark_order(SamoeConfig(**read_yaml("model_micro")), ["transformers", "sam2"], 4, 3, 1, CPU)
    assert {"Meta's order, transformers", "Meta's order, sam2"} < {m.contender for m in measurements}


def test_a_peer_with_another_loss_is_not_timed(monkeypatch):
    class Other(TransformersClip):
        def __call__(self, pixel_values, labels):
            return 1.001 * super().__call__(pixel_values, labels)

    monkeypatch.setitem(PEERS, "transformers", Other)
    with pytest.raises(AssertionError, match="The losses differ"):
        benchmark_order(SamoeConfig(**read_yaml("model_nano")), ["transformers"], 3, 2, 1, CPU)


@pytest.mark.parametrize(
    "arguments",
    ["memory --frames 1", "train --frames 1", "track --frames 9", "track --objects 4 0", "memory --objects -1",
     "parts --repeats 0", "experts --num-experts 0", "train --workers -1"],
)  # fmt: skip
def test_less_than_the_least_is_told_at_once(arguments, capsys):
    with pytest.raises(SystemExit):
        main([*arguments.split()])
    kind, option, *values = arguments.split()
    told = capsys.readouterr().err
    assert f" {kind}: error: {option} must be at least" in told and f"got {values[-1]}" in told


def test_memory_by_part_is_predicted_as_it_is_measured(tmp_path, capsys):
    main(["memory", "--frames", "3", "--objects", "2", "--output", str(tmp_path)])
    rows = re.findall(r"^\| (.+?) \| +([\d.]+) \| +([\d.]+) \|$", (tmp_path / "memory.md").read_text(), re.MULTILINE)
    held = {what: (float(predicted), float(measured)) for what, predicted, measured in rows}
    for part in ("memory attention", "mask decoder", "memory encoder"):
        assert f"{part}, at most" in held and f"{part}, kept" in held
    for what, (predicted, measured) in held.items():
        # Convolutions of a CPU need work space of their own, which the memory encoder's has most of.
        allowed = 0.6 if what == "memory encoder, at most" else 0.08
        assert abs(predicted - measured) <= allowed * measured + 0.01, what
    assert (tmp_path / "memory.png").exists() and "Written: memory.md and memory.png" in capsys.readouterr().out


def test_what_an_object_needs_does_not_include_what_a_frame_needs():
    """Per object, a session keeps its memories, pointers and masks, and nothing of the image."""
    one, four = (tracking_memory(SamoeConfig(**read_yaml("model_micro")), n, CPU, torch.float32) for n in (1, 4))
    kept = "memory and mask of an object on a frame"
    measured = [next(row.measured for row in rows if row.what == kept) for rows in (one, four)]
    assert measured == pytest.approx([next(row.predicted for row in one if row.what == kept)] * 2, rel=0.1)
