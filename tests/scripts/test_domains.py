"""The measures of the guide to domains, at the smallest sizes."""

import json

import numpy as np
import pytest
import torch

import gate_parts
import measure_domains
from gate_parts import tell_apart
from measure_domains import TABLES, main, table
from read_looks import CHANGES


def run(folder, *parts):
    main(["--quick", "--only", *parts, "--output", str(folder)])
    return {part: json.loads((folder / f"{part}.json").read_text())["rows"] for part in parts}


def test_the_gates_figures_are_shares_of_videos(small_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_domains, "small_base", lambda: small_folder)
    monkeypatch.setattr(gate_parts, "MAX_FRAMES", 4)
    monkeypatch.setattr(gate_parts, "MIN_FRAMES", 2)
    rows = run(tmp_path, "known", "changed", "few", "confirm", "many")
    assert [(row["known"], row["look"]) for row in rows["few"]] == [
        (count, look) for count in (2, 3) for look in ("stripes", "blobs")
    ]
    for part, found in rows.items():
        shares = [value for row in found for value in row.values() if isinstance(value, float)]
        assert shares and (part == "many" or all(0 <= share <= 1 for share in shares))
        assert (tmp_path / f"{part}.md").read_text() == table(part, found)
    assert sum(rows["many"][1][kind] for kind in ("right", "base", "wrong")) == pytest.approx(1)
    assert (tmp_path / "domains.png").exists()


def test_variants_that_are_taken_for_each_other_are_left_out():
    torch.manual_seed(0)
    apart = {("shapes", str(index)): torch.randn(12, 4, 8) + 30 * index for index in range(3)}
    alike = {("scenes", str(index)): torch.randn(12, 4, 8) - 30 for index in range(3)}
    kept = tell_apart((4, 4), {**alike, **apart}, 8)
    assert kept[-3:] == list(apart) and len(kept) == 4


def test_a_table_has_means_and_the_most_frequent_neighbour():
    scores = {"base": 0.5, "experts": 0.25, "mix": 0.5, "base and nearest": 0.5}
    rows = [{"look": "night", "nearest": "paper", "own": None, **scores}] * 2
    rows.append({"look": "paper", "nearest": "night", "own": 0.75, **scores, "experts": 1.0})
    lines = table("strangers", rows).splitlines()
    assert lines[2] == "| night | paper | 50.0 | 25.0 | 50.0 | 50.0 |  |"
    assert lines[-1] == "| mean |  | 50.0 | 50.0 | 50.0 | 50.0 |  |"


@pytest.mark.slow
def test_models_are_loaded_and_strangers_tracked(tmp_path):
    rows = run(tmp_path, "load", "strangers", "ranks")
    (ranks,) = rows["ranks"]
    assert ranks["chosen"] <= ranks["bytes"]["32"] and (tmp_path / "ranks.png").exists()
    assert [row["domains"] for row in rows["load"]] == [1, 2] and all(row["tracking"] > 0 for row in rows["load"])
    assert [row["look"] for row in rows["strangers"]] == ["blobs", "stripes", "shapes"]
    assert {row["nearest"] for row in rows["strangers"]} <= {"blobs", "stripes"} and "load" in TABLES


@pytest.mark.parametrize("size", [192, 256])
def test_looks_are_changed_at_any_size_of_a_base(size):
    frames, rng = np.random.default_rng(0).random((1, size, size, 3)), np.random.default_rng(1)
    for name, change in CHANGES.items():
        changed = change(frames, rng)
        assert changed.shape == frames.shape and np.array_equal(changed, frames) == (name == "plain"), name
