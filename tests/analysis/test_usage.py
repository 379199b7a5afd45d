"""Statistics of the routers by hand and against the original, whose tokens are whose, and the pictures."""

import itertools
import json
import math
import runpy
import sys
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from torch import nn

from helpers.reference import ROOT
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.analysis.usage import (
    ExpertUsage,
    RouterSums,
    Source,
    expert_similarity,
    expert_usage,
    mutual_information,
    normalized_entropy,
    observe_routers,
    routing_maps,
)
from samoe_hf.data import SyntheticVideos, Video, read_video, to_datasets
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.model.experts import ExpertLinear, load_balancing_loss, top_k_gates
from samoe_hf.model.processor import build_processor
from samoe_hf.plots.experts import DISTINCT_COLORS, plot_bars, plot_heat_maps, plot_matrices, plot_routing

QUERY = "memory_attention.layers.1.cross_attn_image.q_proj"


def one_hot(experts: list[int], num_experts: int = 4) -> torch.Tensor:
    """Logits of a router that is sure: (1, tokens, experts)."""
    return 50.0 * nn.functional.one_hot(torch.tensor([experts]), num_experts)


def usage_of(logits_by_domain: dict[str, torch.Tensor], top_k: int = 1) -> ExpertUsage:
    parts = {Source(d, "video", 1): RouterSums.of(logits, top_k)[0] for d, logits in logits_by_domain.items()}
    num_experts = next(iter(logits_by_domain.values())).shape[-1]
    return ExpertUsage({"layer": parts}, {"layer": np.full((num_experts, num_experts), np.nan)})


def test_sums_by_hand():
    third = math.log(3)
    logits = torch.tensor([[[third, 0.0, -9.0], [0.0, -9.0, third]], [[0.0, 0.0, -9.0], [0.0, 0.0, -9.0]]])
    first, second = RouterSums.of(logits, 2)
    assert first.tokens == second.tokens == 2
    np.testing.assert_allclose(first.mean_gates, [(0.75 + 0.25) / 2, 0.25 / 2, 0.75 / 2], atol=1e-7)
    np.testing.assert_allclose(first.frequency, [1, 0.5, 0.5])
    np.testing.assert_allclose(first.coactivation, [[1, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    # Nearly all probability is even between two of three experts.
    assert second.router_entropy == pytest.approx(math.log(2) / math.log(3), abs=1e-3)
    both = RouterSums.total([first, second])
    assert both.tokens == 4
    np.testing.assert_allclose(both.mean_gates, (first.mean_gates + second.mean_gates) / 2)
    expected = load_balancing_loss({"layer": logits.flatten(0, 1)}, 2).item()
    assert both.load_balancing_loss == pytest.approx(expected, rel=1e-6)


def test_an_expert_whose_weight_vanishes_is_still_chosen():
    sums = RouterSums.of(torch.tensor([[[2000.0, 0.0, -1.0]]]), 2)[0]
    np.testing.assert_allclose(sums.mean_gates, [1, 0, 0])
    np.testing.assert_allclose(sums.frequency, [1, 1, 0])


def test_any_layout_of_tokens_counts_the_same():
    logits = torch.randn(2, 3, 4, 5)
    for row, sums in zip(logits, RouterSums.of(logits, 2), strict=True):
        assert sums.tokens == 12
        np.testing.assert_allclose(sums.mean_gates, top_k_gates(row, 2).mean(dim=(0, 1)), atol=1e-6)
    assert RouterSums.of(logits[0, 0], 2)[0].tokens == 1


def test_usage_equals_the_original(reference):
    """The original's `get_expert_statistics`: gate weights averaged over batch and tokens."""
    expected = reference.load("memory_attention")
    attention = reference.model.memory_attention.layers[1].cross_attn_image
    sums = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = getattr(attention, name)
        logits = projection.router(expected[f"layer1.cross_attn.{name[0]}"])
        parts = RouterSums.of(logits, projection.num_experts_per_tok)
        sums[name] = {Source("random", "video", row): part for row, part in enumerate(parts)}
    table = ExpertUsage(sums, {}).to_pandas("module")
    for name in sums:
        usage = expected[f"layer1.cross_attn.expert_usage.{name}"]
        np.testing.assert_allclose(table[table.module == name].mean_gate, usage, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "weights, expected",
    [([1, 1, 1, 1], 1.0), ([0, 7, 0, 0], 0.0), ([0.5, 0.5, 0, 0], 0.5), ([3.0], 0.0)],
)
def test_entropy_of_usage(weights, expected):
    assert normalized_entropy(np.array(weights, dtype=float)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "usage, expected",
    [
        ([[1, 0], [0, 1]], 1.0),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], math.log2(3)),
        ([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], 1.0),
        ([[0.2, 0.8], [0.2, 0.8]], 0.0),
        ([[0.2, 0.8]], 0.0),
        ([[0.75, 0.25], [0.25, 0.75]], 1 + 0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)),
    ],
)
def test_mutual_information_of_domain_and_expert(usage, expected):
    assert mutual_information(np.array(usage, dtype=float)) == pytest.approx(expected, abs=1e-12)


def test_domains_have_equal_weight_whatever_their_size():
    usage = usage_of({"large": one_hot([0] * 99), "small": one_hot([1])})
    row = usage.statistics().loc["layer"]
    assert row.domain_information == pytest.approx(1.0)
    assert row.domain_information_share == pytest.approx(1.0)
    assert usage.statistics("small").loc["layer"].domain_information == 0.0
    # Everything else is over all tokens.
    np.testing.assert_allclose(usage.to_pandas("module").mean_gate, [0.99, 0.01, 0, 0], atol=1e-7)


def test_statistics_of_even_and_of_gathered_routing():
    even = usage_of({"d": one_hot([0, 1, 2, 3])}).statistics().loc["layer"]
    assert even.usage_entropy == pytest.approx(1) and even.router_entropy == pytest.approx(0, abs=1e-6)
    assert (even.load_cv, even.load_max, even.dead_experts) == (0, 1, [])
    assert even.load_balancing_loss == pytest.approx(1)
    gathered = usage_of({"d": one_hot([2, 2, 2, 2])}).statistics().loc["layer"]
    assert gathered.usage_entropy == pytest.approx(0, abs=1e-6)
    assert (gathered.load_cv, gathered.load_max) == (pytest.approx(math.sqrt(3)), 4)
    assert gathered.load_balancing_loss == pytest.approx(4)
    assert gathered.dead_experts == [0, 1, 3]
    assert gathered.domain_information == 0 and math.isnan(gathered.mean_similarity)
    undecided = usage_of({"d": torch.zeros(1, 6, 4)}, top_k=2).statistics().loc["layer"]
    assert undecided.router_entropy == pytest.approx(1)


def test_dead_experts_are_those_below_a_share():
    usage = usage_of({"d": one_hot([0] * 98 + [1] * 2)})
    assert usage.statistics().loc["layer"].dead_experts == [2, 3]
    assert usage.statistics(dead_share=0.05).loc["layer"].dead_experts == [1, 2, 3]
    assert usage.statistics(dead_share=0.0).loc["layer"].dead_experts == [2, 3]


def test_similarity_equals_that_of_the_whole_matrices():
    torch.manual_seed(0)
    settings = {"num_experts_per_tok": 1, "lora_rank": 3, "lora_alpha": 1.0}
    layer = ExpertLinear(7, 5, num_experts=5, **settings)
    with torch.no_grad():
        layer.lora_B.normal_()
        # The same update in another basis, three times as large; its opposite; none.
        mix = torch.randn(3, 3)
        layer.lora_A[1], layer.lora_B[1] = mix @ layer.lora_A[0], 3 * layer.lora_B[0] @ mix.inverse()
        layer.lora_A[2], layer.lora_B[2] = layer.lora_A[0], -layer.lora_B[0]
        layer.lora_B[4] = 0
    similarity = expert_similarity(layer)
    updates = (layer.lora_B @ layer.lora_A).detach().flatten(1).double()
    expected = nn.functional.cosine_similarity(updates[:4, None], updates[None, :4], dim=-1)
    np.testing.assert_allclose(similarity[:4, :4], expected, atol=1e-5)
    assert similarity[0, 1] == pytest.approx(1, abs=1e-5) and similarity[0, 2] == pytest.approx(-1, abs=1e-5)
    assert abs(similarity[0, 3]) < 0.9
    assert np.isnan(similarity[4]).all() and np.isnan(similarity[:, 4]).all()
    assert np.isnan(expert_similarity(ExpertLinear(7, 5, num_experts=2, **settings))).all()


@pytest.fixture(scope="module")
def entering() -> Video:
    """Three objects with ids that skip; the one in the middle enters on frame 2, the last on frame 1."""
    video = next(v for v in SyntheticVideos(40, 5, (96, 128), seed=1) if len(v.object_ids) == 3)
    masks = np.stack([video.masks(t) for t in range(5)])
    masks[:2, 1] = False
    masks[:1, 2] = False
    frames = np.stack(list(video.frames))
    return Video.from_arrays("entering", frames, masks, [2, 5, 9], domain="shapes")


def alone(video: Video, object_id: int) -> Video:
    masks = np.stack([video.masks(t, [object_id]) for t in range(len(video))])
    return Video.from_arrays(video.video_id, np.stack(list(video.frames)), masks, [object_id], domain=video.domain)


def test_tokens_are_told_by_object(nano, entering):
    """Objects run together in batches; each must get what it gets alone."""
    together = expert_usage(nano.model, [entering], show_progress_bar=False)
    assert together.modules == nano.model.expert_module_names
    apart = {i: expert_usage(nano.model, [alone(entering, i)], show_progress_bar=False) for i in entering.object_ids}
    largest = 0.0
    for module in together.modules:
        parts = together.sums[module]
        assert set(parts) == {Source("shapes", "entering", i) for i in (2, 5, 9)}
        for source, sums in parts.items():
            expected = apart[source.object_id].sums[module][source]
            assert sums.tokens == expected.tokens
            np.testing.assert_allclose(sums.mean_gates, expected.mean_gates, atol=5e-3)
        gates = [sums.mean_gates for sums in parts.values()]
        largest = max(largest, np.abs(gates[0] - gates[1]).max(), np.abs(gates[1] - gates[2]).max())
    assert largest > 0.02
    # 64 positions on each frame after the prompted one.
    tokens = {source.object_id: sums.tokens for source, sums in together.sums[QUERY].items()}
    assert tokens == {2: 4 * 64, 5: 2 * 64, 9: 3 * 64}


def test_usage_equals_gates_recorded_by_hand(nano, entering):
    gates = []
    module = nano.model.get_submodule(QUERY)
    handle = module.router_logits.register_forward_hook(lambda _, __, x: gates.append(module.gates(x).flatten(0, -2)))
    segment_video(nano.model, build_processor(nano.model.config), entering)
    handle.remove()
    table = expert_usage(nano.model, [entering], show_progress_bar=False).to_pandas()
    table = table[table.module == QUERY]
    np.testing.assert_allclose(table.mean_gate, torch.cat(gates).mean(dim=0), atol=1e-5)
    assert set(table.projection) == {"q_proj"} and set(table.domain) == {"shapes"}
    assert list(table.expert) == list(range(module.num_experts))


def test_logits_are_not_kept(nano, entering):
    alive, most = [], 0
    router = nano.model.get_submodule(QUERY).router_logits

    def watch(_, __, logits):
        nonlocal most
        alive.append(weakref.ref(logits))
        most = max(most, sum(ref() is not None for ref in alive))

    handle = router.register_forward_hook(watch)
    try:
        expert_usage(nano.model, [entering, entering], show_progress_bar=False)
    finally:
        handle.remove()
    assert len(alive) > 8 and most <= 3  # of one frame, whose objects read three different sets of memories


def test_datasets_and_lists_of_videos_give_the_same(nano, entering, tmp_path):
    videos = [entering, SyntheticVideos(1, 3, (96, 96), domain="blobs", seed=2)[0]]
    expected = expert_usage(nano.model, videos, show_progress_bar=False).to_pandas("object")
    dataset = to_datasets(videos, cache_dir=str(tmp_path))
    usage = expert_usage(nano.model, dataset, show_progress_bar=False)
    pd.testing.assert_frame_equal(usage.to_pandas("object"), expected)


@pytest.mark.parametrize(
    "dataset, message",
    [
        ([{"pixel_values": 0}], "must hold samoe_hf.data.Video, got an item of type dict"),
        (SyntheticVideos(1, 2, (64, 64))[0], "put it into a list"),
        ([], "No router ran"),
        (SyntheticVideos(2, 1, (64, 64)), "No router ran"),
    ],
)
def test_bad_datasets_are_refused_and_leave_the_model_as_it_was(nano, dataset, message):
    with pytest.raises(ValueError, match=message):
        expert_usage(nano.model, dataset, show_progress_bar=False)
    assert not nano.model._forward_hooks and not nano.model.get_submodule(QUERY).router_logits._forward_hooks


def test_a_model_in_training_mode_is_analysed_without_dropout_and_put_back(nano, entering):
    expected = expert_usage(nano.model, [entering], show_progress_bar=False).to_pandas()
    nano.model.train()
    try:
        usage = expert_usage(nano.model, [entering], show_progress_bar=False).to_pandas()
        assert nano.model.training
    finally:
        nano.model.eval()
    pd.testing.assert_frame_equal(usage, expected)


def test_routing_maps_hold_the_expert_of_largest_gate(nano, entering):
    seen = {}

    def note(t, name, logits, object_ids):
        if name == QUERY:
            gates = top_k_gates(logits, 2)
            seen.update({(t, i): row.argmax(dim=-1).view(8, 8) for i, row in zip(object_ids, gates, strict=True)})

    with observe_routers(nano.model, note):
        masks, _ = segment_video(nano.model, build_processor(nano.model.config), entering)
    maps = routing_maps(nano.model, entering)
    assert maps.module == QUERY and maps.object_ids == [2, 5, 9] and maps.experts.shape == (5, 3, 8, 8)
    first = {2: 1, 5: 3, 9: 2}
    for t, (column, object_id) in itertools.product(range(5), enumerate(maps.object_ids)):
        if t < first[object_id]:
            assert (maps.experts[t, column] == -1).all() and (t, object_id) not in seen
        else:
            np.testing.assert_array_equal(maps.experts[t, column], seen[t, object_id])
    np.testing.assert_array_equal(maps.masks, masks)


def test_routing_maps_are_laid_out_as_the_image_is(nano):
    """Only a corner of the image is lit, and the positions that are routed differently must be there."""
    frames = np.zeros((2, 128, 128, 3), dtype=np.uint8)
    masks = np.zeros((2, 1, 128, 128), dtype=bool)
    masks[:, :, 40:90, 40:90] = True
    module = "memory_attention.layers.0.self_attn.q_proj"
    dark = routing_maps(nano.model, Video.from_arrays("dark", frames, masks), module=module)
    frames[1, :32, 96:] = 255
    lit = routing_maps(nano.model, Video.from_arrays("lit", frames, masks), module=module)
    changed = np.argwhere(dark.experts[1, 0] != lit.experts[1, 0])
    assert len(changed) and changed[:, 0].mean() < 3.5 < changed[:, 1].mean()


@pytest.fixture(scope="module")
def everywhere(nano) -> SamoeModel:
    """Experts in the vision encoder, the memory encoder, the mask decoder and the pointers' projection."""
    torch.manual_seed(0)
    modules = r"vision_encoder\.backbone\.blocks\.\d+\.(attn\.qkv|mlp\.proj_in)|memory_encoder\..*pointwise_conv1"
    modules += r"|mask_decoder\.transformer\.layers\.0\..*q_proj|object_pointer_proj\.proj_in"
    config = SamoeConfig.from_dict({**nano.model.config.to_dict(), "expert_modules": modules})
    return SamoeModel(config).eval()


def test_experts_in_other_layers(everywhere, entering):
    usage = expert_usage(everywhere, [entering], show_progress_bar=False)
    assert usage.modules == everywhere.expert_module_names
    objects = {module: {source.object_id for source in parts} for module, parts in usage.sums.items()}
    for module, ids in objects.items():
        assert ids == ({None} if module.startswith("vision_encoder") else {2, 5, 9}), module
    pointers = usage.sums["object_pointer_proj.proj_in"]
    assert {source.object_id: sums.tokens for source, sums in pointers.items()} == {2: 5, 5: 3, 9: 4}
    table = usage.to_pandas("object")
    assert table[table.module.str.startswith("vision")].object_id.isna().all()


def test_routing_maps_of_the_vision_encoder(everywhere, entering, tmp_path):
    module = next(name for name in everywhere.expert_module_names if name.endswith("blocks.0.mlp.proj_in"))
    maps = routing_maps(everywhere, entering, module=module)
    assert maps.object_ids == [None] and maps.experts.shape == (5, 1, 32, 32) and maps.experts.min() == 0
    assert all(file.stat().st_size > 1000 for file in maps.save(tmp_path / "maps"))
    for name in everywhere.expert_module_names:
        if ".mlp." not in name:
            with pytest.raises(ValueError, match="tokens are image positions"):
                routing_maps(everywhere, entering, module=name)


def rgb(number: int) -> np.ndarray:
    return np.array([int(DISTINCT_COLORS[number][i : i + 2], 16) for i in (1, 3, 5)], dtype=float)


def test_routing_pictures_show_the_colours_of_the_experts(nano, entering, tmp_path):
    maps = routing_maps(nano.model, entering)
    maps.experts[1:, 0, :, :4], maps.experts[1:, 0, :, 4:] = 3, 1
    maps.masks[:] = False
    png, mp4 = maps.save(tmp_path / "maps", object_id=2)
    assert png.stat().st_size > 1000
    video = read_video(mp4)
    assert len(video) == 5 and video.size[0] > 480 and video.size[1] == 2 * 640
    right = video[3][:480, 640:].astype(float)
    grey = np.repeat(np.array(Image.fromarray(entering.frames[3]).convert("L").resize((640, 480)))[..., None], 3, -1)
    for columns, expert in ((slice(20, 300), 3), (slice(340, 620), 1)):
        expected = (0.3 * grey + 0.7 * rgb(expert))[:, columns].mean(axis=(0, 1))
        np.testing.assert_allclose(right[:, columns].mean(axis=(0, 1)), expected, atol=8)
    # The prompted frame has no map and stays grey.
    unmapped = video[0][:480, 640:].astype(float)
    assert np.abs(unmapped - unmapped.mean(axis=-1, keepdims=True)).mean() < 3
    with pytest.raises(ValueError, match=r"`object_id` must be one of \[2, 5, 9\], got 4"):
        maps.save(tmp_path / "other", object_id=4)


def overlapping_texts(figure) -> list[tuple[str, str]]:
    """Pairs of texts of a figure that cover each other; nothing may stick out of it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.02
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer()).padded(-1)) for text in texts]
    boxes = [(text, box) for text, box in boxes if box.width > 0 and box.height > 0]
    assert len(boxes) > 5
    return [(a, b) for (a, p), (b, q) in itertools.combinations(boxes, 2) if p.overlaps(q)]


@pytest.mark.parametrize("layers, experts, domains", [(32, 10, 2), (3, 16, 5), (1, 2, 1), (5, 4, 3)])
def test_labels_of_the_pictures_do_not_overlap(layers, experts, domains):
    rng = np.random.default_rng(0)
    names = [f"layer {n // 8} {('self', 'cross')[n // 4 % 2]} {'qkvo'[n % 4]}" for n in range(layers)]
    names[-1] = "vision_encoder.backbone.blocks.11.mlp.proj_out"
    tables = {f"domain {d}": rng.dirichlet(np.ones(experts), layers) for d in range(domains)}
    panels = {name: {d: table[row] for d, table in tables.items()} for row, name in enumerate(names)}
    figures = [
        plot_bars(panels, "mean gate weight", "Weight that routers give to each expert, by domain"),
        plot_heat_maps(tables, names, "mean gate weight", "Weight that routers give to each expert"),
        plot_heat_maps(
            tables, names, "difference", "Title", diverging=True, bars=("information", np.ones(layers), 1.0)
        ),
        plot_matrices({name: np.eye(experts) for name in names}, "share of tokens", "Experts that are chosen together"),
    ]
    for figure in figures:
        assert overlapping_texts(figure) == []


def test_more_experts_than_colours(tmp_path):
    """The nine that are chosen most have colours; the rest is called other experts."""
    frames, masks = np.zeros((2, 40, 40, 3), dtype=np.uint8), np.zeros((2, 40, 40), dtype=bool)
    maps = np.full((2, 4, 4), -1)
    maps[1] = np.minimum(np.arange(16), 13).reshape(4, 4)
    plot_routing(frames, masks, maps, 14, tmp_path / "strip.png", "title")
    picture = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB")).reshape(-1, 3).astype(int)
    for number in range(len(DISTINCT_COLORS)):
        assert (np.abs(picture - 0.7 * rgb(number)).max(axis=1) < 3).sum() > 50, number


def test_save_writes_tables_figures_and_pictures(nano, entering, tmp_path):
    videos = [entering, SyntheticVideos(1, 3, (96, 96), domain="blobs", seed=2)[0]]
    usage = expert_usage(nano.model, videos, show_progress_bar=False)
    files = {file.name: file for file in usage.save(tmp_path / "out")}
    assert sorted(files) == sorted(file.name for file in (tmp_path / "out").iterdir())
    assert {"usage.csv", "usage_by_object.csv", "statistics.json", "usage_bars.png", "domains.png"} <= set(files)
    table = pd.read_csv(files["usage.csv"])
    assert len(table) == 16 * 4 * 2
    sums = table.groupby(["module", "domain"])[["mean_gate", "selection_frequency"]].sum()
    np.testing.assert_allclose(sums, np.tile([1, 2], (32, 1)), atol=1e-6)
    report = json.loads(files["statistics.json"].read_text(), parse_constant=pytest.fail)
    assert report["domains"] == {"shapes": {"videos": 1}, "blobs": {"videos": 1}}
    assert report["modules"][QUERY]["domain_information"] > 0
    assert set(report["modules_by_domain"]) == {"shapes", "blobs"}
    assert np.shape(report["similarity"][QUERY]) == np.shape(report["coactivation"][QUERY]) == (4, 4)
    for figure in (usage.plot_domains(), usage.plot_objects()):
        assert overlapping_texts(figure) == []
    with pytest.raises(ValueError, match="`domain` must be one of"):
        usage.statistics("stripes")
    with pytest.raises(ValueError, match="`by` must be"):
        usage.to_pandas("layer")


@pytest.mark.parametrize("num_experts", [1, 3])
def test_save_of_one_domain_and_one_layer(tmp_path, num_experts):
    usage = usage_of({"d": torch.randn(1, 20, num_experts)})
    names = [file.name for file in usage.save(tmp_path)]
    assert "domains.png" not in names and "similarity.png" in names
    report = json.loads((tmp_path / "statistics.json").read_text(), parse_constant=pytest.fail)
    assert report["modules"]["layer"]["mean_similarity"] is None
    assert report["similarity"]["layer"] == [[None] * num_experts] * num_experts


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs scripts/experts.py in this process and returns what it printed, or its message where it fails."""

    def run(*arguments: object, fails: bool = False) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["experts.py", *map(str, arguments)])
        if not fails:
            runpy.run_path(str(ROOT / "scripts" / "experts.py"), run_name="__main__")
            return "".join(capfd.readouterr())
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(ROOT / "scripts" / "experts.py"), run_name="__main__")
        assert exit_info.value.code.startswith("error: ")
        return exit_info.value.code

    return run


@pytest.fixture
def two_domains(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    source = "kind: synthetic, num_videos: 2, num_frames: 3, image_size: [96, 96], seed: 5"
    path.write_text(f"eval_data:\n  - {{{source}, domain: shapes}}\n  - {{{source}, domain: blobs}}\n")
    return path


def test_script_shows_two_domains_and_maps_the_chosen_video_and_layer(run, model_folder, two_domains, tmp_path):
    """That it maps the first video of each domain by default is in the walk-through."""
    module = "memory_attention.layers.0.self_attn.v_proj"
    printed = run(model_folder, "--dataset", two_domains, "--output", tmp_path / "out", "--routing-video", 3,
                  "--routing-module", module, "--routing-object", 1)  # fmt: skip
    assert "layer 1 cross q" in printed and "domain_information" in printed and "4/4" in printed
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {name for name in names if "routing" in name} == {f"routing_blobs_blobs_5_00001.{s}" for s in ("png", "mp4")}
    assert "domains.png" in names


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--routing-video", "4"], "`--routing-video` must be an id or a number below 4, got '4'"),
        (["--routing-module", QUERY.replace("q_proj", "k_proj")], "tokens are image positions"),
        (
            ["--routing-video", "0", "--routing-object", "77"],
            "`--routing-object` 77 is not in shapes_5_00000",
        ),
        (["--routing-object", "77"], "`--routing-object` 77 is in none of the videos"),
    ],
)
def test_script_refuses_bad_choices_before_it_writes(run, model_folder, two_domains, tmp_path, arguments, message):
    printed = run(model_folder, "--dataset", two_domains, "--output", tmp_path / "out", *arguments, fails=True)
    assert message in printed
    assert not (tmp_path / "out").exists()
