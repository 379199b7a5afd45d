"""Statistics of the routers by hand and against the original, and whose tokens are whose."""

import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from helpers.pictures import overlapping_texts
from samoe_hf.analysis.usage import ExpertUsage, RouterSums, Source, expert_similarity, expert_usage, mutual_information
from samoe_hf.data import SyntheticVideos, Video
from samoe_hf.model.expert_layer import ExpertLinear
from samoe_hf.model.expert_router import top_k_gates
from samoe_hf.surgery.experts import replace_experts

QUERY = "memory_attention.layers.1.cross_attn_image.q_proj"
SHARED_LAYERS = ("memory_attention.layers.0.self_attn.", "memory_attention.layers.0.cross_attn_image.q_proj")


def one_hot(experts: list[int], num_experts: int = 4) -> torch.Tensor:
    """Logits of a router that is sure: (1, tokens, experts)."""
    return 50.0 * nn.functional.one_hot(torch.tensor([experts]), num_experts)


def usage_of(logits_by_domain: dict[str, torch.Tensor], top_k: int = 1) -> ExpertUsage:
    parts = {Source(d, "video", 1): RouterSums.from_logits(logits, top_k)[0] for d, logits in logits_by_domain.items()}
    num_experts = next(iter(logits_by_domain.values())).shape[-1]
    return ExpertUsage({"layer": parts}, {"layer": np.full((num_experts, num_experts), np.nan)})


def test_sums_by_hand():
    third = math.log(3)
    logits = torch.tensor([[[third, 0.0, -9.0], [0.0, -9.0, third]], [[0.0, 0.0, -9.0], [0.0, 0.0, -9.0]]])
    first, second = RouterSums.from_logits(logits, 2)
    assert first.tokens == second.tokens == 2
    np.testing.assert_allclose(first.mean_gates, [(0.75 + 0.25) / 2, 0.25 / 2, 0.75 / 2], atol=1e-7)
    np.testing.assert_allclose(first.frequency, [1, 0.5, 0.5])
    np.testing.assert_allclose(first.coactivation, [[1, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    # Nearly all probability is even between two of three experts.
    assert second.router_entropy == pytest.approx(math.log(2) / math.log(3), abs=1e-3)
    both = first + second
    assert both.tokens == 4
    np.testing.assert_allclose(both.mean_gates, (first.mean_gates + second.mean_gates) / 2)
    # An expert whose weight vanishes is still chosen.
    sums = RouterSums.from_logits(torch.tensor([[[2000.0, 0.0, -1.0]]]), 2)[0]
    np.testing.assert_allclose(sums.mean_gates, [1, 0, 0])
    np.testing.assert_allclose(sums.frequency, [1, 1, 0])
    windows = torch.randn(2, 3, 4, 5)
    np.testing.assert_allclose(
        RouterSums.from_logits(windows, 2)[1].mean_gates, top_k_gates(windows[1], 2).mean(dim=(0, 1)), atol=1e-6
    )


def test_usage_equals_the_original(reference):
    """The original's `get_expert_statistics`: gate weights averaged over batch and tokens."""
    expected = reference.load("memory_attention")
    attention = reference.model.memory_attention.layers[1].cross_attn_image
    sums = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = getattr(attention, name)
        logits = projection.router(expected[f"layer1.cross_attn.{name[0]}"])
        parts = RouterSums.from_logits(logits, projection.num_experts_per_tok)
        sums[name] = {Source("random", "video", row): part for row, part in enumerate(parts)}
    table = ExpertUsage(sums, {}).to_pandas("module")
    for name in sums:
        usage = expected[f"layer1.cross_attn.expert_usage.{name}"]
        np.testing.assert_allclose(table[table.module == name].mean_gate, usage, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "usage, information",
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], math.log2(3)),
        ([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], 1.0),
        ([[0.2, 0.8], [0.2, 0.8]], 0.0),
        ([[0.75, 0.25], [0.25, 0.75]], 1 + 0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)),
    ],
)
def test_mutual_information_of_domain_and_expert(usage, information):
    assert mutual_information(np.array(usage, dtype=float)) == pytest.approx(information, abs=1e-12)


def test_statistics_of_even_and_of_gathered_routing():
    even = usage_of({"d": one_hot([0, 1, 2, 3])}).statistics().loc["layer"]
    assert even.usage_entropy == pytest.approx(1) and even.router_entropy == pytest.approx(0, abs=1e-6)
    assert (even.load_cv, even.load_max, even.dead_experts) == (0, 1, [])
    gathered = usage_of({"d": one_hot([2, 2, 2, 2])}).statistics().loc["layer"]
    assert gathered.usage_entropy == pytest.approx(0, abs=1e-6)
    assert (gathered.load_cv, gathered.load_max) == (pytest.approx(math.sqrt(3)), 4)
    assert gathered.dead_experts == [0, 1, 3]
    assert gathered.domain_information == 0 and math.isnan(gathered.mean_similarity)
    undecided = usage_of({"d": torch.zeros(1, 6, 4)}, top_k=2).statistics().loc["layer"]
    assert undecided.router_entropy == pytest.approx(1)


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
        if module.startswith(SHARED_LAYERS):
            # It reads the image alone, once for all objects, on each frame that has a memory.
            assert {source: sums.tokens for source, sums in parts.items()} == {Source("shapes", "entering", None): 256}
            expected = apart[2].sums[module]
            np.testing.assert_allclose(*(next(iter(p.values())).mean_gates for p in (parts, expected)), atol=1e-6)
            continue
        assert set(parts) == {Source("shapes", "entering", i) for i in (2, 5, 9)}
        for source, sums in parts.items():
            expected = apart[source.object_id].sums[module][source]
            assert sums.tokens == expected.tokens
            np.testing.assert_allclose(sums.mean_gates, expected.mean_gates, atol=5e-3)
        gates = [sums.mean_gates for sums in parts.values()]
        largest = max(largest, np.abs(gates[0] - gates[1]).max(), np.abs(gates[1] - gates[2]).max())
    assert largest > 0.02
    # As gates recorded by hand; the model is in evaluation mode meanwhile.
    gates, module = [], nano.model.get_submodule(QUERY)
    handle = module.router_logits.register_forward_hook(lambda _, __, x: gates.append(module.gates(x).flatten(0, -2)))
    nano.model.train()
    try:
        table = expert_usage(nano.model, [entering], show_progress_bar=False).to_pandas()
        assert nano.model.training
    finally:
        nano.model.eval()
        handle.remove()
    pd.testing.assert_frame_equal(table, together.to_pandas())
    table = table[table.module == QUERY]
    np.testing.assert_allclose(table.mean_gate, torch.cat(gates).mean(dim=0), atol=1e-5)
    assert list(table.expert) == [0, 1, 2, 3] and set(table.projection) == {"q_proj"}
    # 64 positions on each frame after the prompted one.
    tokens = {source.object_id: sums.tokens for source, sums in together.sums[QUERY].items()}
    assert tokens == {2: 4 * 64, 5: 2 * 64, 9: 3 * 64}


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


def test_save_writes_tables_figures_and_pictures(nano, entering, tmp_path):
    videos = [entering, SyntheticVideos(1, 3, (96, 96), domain="blobs", seed=2)[0]]
    usage = expert_usage(nano.model, videos, show_progress_bar=False)
    drawn = [QUERY, usage.modules[-1]]  # pictures of all take long
    usage = ExpertUsage({module: usage.sums[module] for module in drawn}, usage.similarity)
    files = {file.name: file for file in usage.save(tmp_path / "out")}
    assert sorted(files) == sorted(file.name for file in (tmp_path / "out").iterdir())
    assert {"usage.csv", "usage_by_object.csv", "statistics.json", "usage_bars.png", "domains.png"} <= set(files)
    table = pd.read_csv(files["usage.csv"])
    assert len(table) == 2 * 4 * 2
    sums = table.groupby(["module", "domain"])[["mean_gate", "selection_frequency"]].sum()
    np.testing.assert_allclose(sums, np.tile([1, 2], (4, 1)), atol=1e-6)
    report = json.loads(files["statistics.json"].read_text(), parse_constant=pytest.fail)
    assert report["domains"] == {"shapes": {"videos": 1}, "blobs": {"videos": 1}}
    assert report["modules"][QUERY]["domain_information"] > 0
    assert set(report["modules_by_domain"]) == {"shapes", "blobs"}
    assert np.shape(report["similarity"][QUERY]) == np.shape(report["coactivation"][QUERY]) == (4, 4)
    for figure in (usage.plot("domains"), usage.plot("objects")):
        assert overlapping_texts(figure) == []
    with pytest.raises(ValueError, match="`domain` must be one of"):
        usage.statistics("stripes")
    with pytest.raises(ValueError, match="`by` must be"):
        usage.to_pandas("layer")
    with pytest.raises(ValueError, match=r"`kind` must be one of usage_bars, .*, got 'pie'"):
        usage.plot("pie")


@pytest.mark.parametrize("num_experts", [1])
def test_a_save_of_one_domain_is_whole_or_leaves_the_folder_as_it_was(tmp_path, monkeypatch, num_experts):
    usage = usage_of({"d": torch.randn(1, 20, num_experts)})
    names = [file.name for file in usage.save(tmp_path / "old")]
    assert "domains.png" not in names and "similarity.png" in names
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    report = json.loads(before["statistics.json"], parse_constant=pytest.fail)
    assert report["modules"]["layer"]["mean_similarity"] is None
    assert report["similarity"]["layer"] == [[None] * num_experts] * num_experts
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: 1 / 0)
    for name in ("old", "new"):
        with pytest.raises(ZeroDivisionError):
            usage_of({"d": torch.randn(1, 20, 3)}).save(tmp_path / name)
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_routers_of_one_expert_are_seen_too(nano):
    """Where nobody looks, such an expert is part of its layer's weight while a video is tracked."""
    model = copy.deepcopy(nano.model)
    replace_experts(model, num_experts=1, num_experts_per_tok=1)
    videos = SyntheticVideos(1, 3, (96, 128), seed=3)
    seen, expected = (expert_usage(one, videos, show_progress_bar=False) for one in (model, nano.model))
    assert seen.modules == expected.modules and (seen.to_pandas().mean_gate == 1).all()
    assert seen.to_pandas().tokens.max() == expected.to_pandas().tokens.max()
