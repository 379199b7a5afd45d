"""Benchmarks: what is compared is the same work, what is measured is what is reported."""

import copy
import json

import pytest
import torch

import experts
import exported
import memory
import tracking
import training
from count_kernels import count_bytes, count_frame
from experts import dense_forward
from measure import Measurement, to_markdown, without_dropout
from memory import tracking_memory
from meta_order import TransformersClip, benchmark_order
from peers import Sam2Tracker, TransformersTracker, base_of, sam2_of
from samoe_hf import SamoeConfig, SamoeModel, small_base
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.expert_layer import ExpertLinear, expert_modules
from tracking import check_equal
from training import example_clip

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["model_none", "./none", "a/b/c"])
def test_an_unknown_model_is_a_line(model, capfd):
    with pytest.raises(SystemExit) as caught:
        exported.main([model])
    said = f"{model!r} is neither a folder or file here" if "/" in model else ""
    assert caught.value.code == 2 and f"error: {said}" in capfd.readouterr().err


def test_the_dense_form_computes_the_same():
    layer = ExpertLinear(16, 24, num_experts=5, num_experts_per_tok=2, lora_rank=3, lora_alpha=2.0)
    torch.nn.init.normal_(layer.lora_B)
    tokens = torch.randn(2, 7, 16)
    torch.testing.assert_close(dense_forward(layer, tokens), layer(tokens), rtol=1e-4, atol=1e-5)


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
    check_equal({"transformers": expected, "sam2": track(Sam2Tracker(sam2_of(nano.model)), frames, points)})


def test_contenders_that_differ_are_not_timed():
    masks = torch.zeros(2, 1, 4, 4)
    with pytest.raises(AssertionError, match="b and a do not agree"):
        check_equal({"a": masks, "b": masks + 0.5})


@pytest.mark.slow
def test_the_programs_write_tables_plots_and_times(tmp_path, capsys):
    common = ["--repeats", "1", "--output", str(tmp_path)]
    tracking.main(["--peers", "transformers", "--objects", "1", "2", "--frames", "10", *common])
    experts.main(["--tokens", "64", "--width", "32", *common])
    training.main(["--model", "model_nano", "--frames", "2", *common])
    memory.main(["--frames", "2", "--objects", "1", "--output", str(tmp_path)])
    files = {f"{name}.{kind}" for name in ("track", "experts", "train") for kind in ("md", "json", "png")}
    assert {file.name for file in tmp_path.iterdir()} == files | {"memory.md", "memory.png"}
    times = json.loads((tmp_path / "track.json").read_text())["measurements"]
    assert [(m["case"], m["contender"]) for m in times] == [
        (f"micro, {count}", name) for count in ("1 object", "2 objects") for name in ("samoe_hf", "transformers")
    ]
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


@pytest.mark.slow
def test_training_is_timed_beside_metas_order():
    measurements, kernels = benchmark_order(SamoeConfig(**read_yaml("model_nano")), ["transformers"], 3, 2, 1, CPU)
    contenders = {(m.case, m.contender) for m in measurements}
    assert ("everything trained", "Meta's order, transformers") in contenders and len(measurements) == 6
    assert ("encoder frozen", "samoe_hf, experts, cached features") in contenders
    assert all(len(m.seconds) == 1 and m.median > 0 for m in measurements)
    counts = {(case, contender): int(count) for case, contender, count in kernels}
    assert counts.keys() == contenders
    assert 0 < counts["encoder frozen", "samoe_hf, experts alone"] < counts["encoder frozen", "samoe_hf"]


@pytest.mark.slow
def test_memory_of_tracking_is_that_of_its_tensors():
    """Per object, a session keeps its memories, pointers and masks, and nothing of the image."""
    config = SamoeConfig(**read_yaml("model_micro"))
    rows = dict(tracking_memory(config, 3, CPU, torch.float32))
    model = SamoeModel(config)
    fine, middle, coarse = (height * width for height, width in model.backbone_feature_sizes)
    width = model.hidden_dim
    assert rows["weights"] == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert rows["features of a frame"] == 4 * (fine * width // 8 + middle * width // 4 + coarse * width)
    # A memory in bfloat16, a pointer and a mask's logits in float32, and a score.
    of_object = 2 * coarse * model.mem_dim + 4 * width + 4 * fine + 4
    assert rows["memory and mask of an object on a frame"] == pytest.approx(of_object, rel=0.1)
    assert all(rows[f"{part}, at most"] > 0 for part in ("image encoder", "memory attention", "mask decoder"))


@pytest.mark.slow
def test_a_frame_takes_few_kernels():
    config = SamoeConfig.from_pretrained(small_base())
    contenders = ("ten experts", "one-expert domain", "no experts", "transformers")
    experts, one, none, peer = (count_frame(config, contender, 1, torch.float32).total() for contender in contenders)
    assert experts <= 0.7 * peer and one == none <= 0.6 * peer


def test_further_objects_move_bytes_and_start_no_kernels():
    config = SamoeConfig(**read_yaml("model_nano"))
    one, two, four = (count_bytes(config, count, torch.float32) for count in (1, 2, 4))
    assert two.kernels == four.kernels
    for part in ("memory attention", "decoder", "memory encoder"):
        a, b, c = (sum(x for (own, _), x in found.bytes.items() if own == part) for found in (one, two, four))
        assert 0 < (c - b) / 2 <= 1.5 * (b - a)
