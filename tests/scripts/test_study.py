"""A study of forgetting: what it measures, and that it goes on where it was stopped."""

import json
import re

import numpy as np
import pytest
import yaml

import run_study
from helpers.reference import ROOT
from samoe_hf.continual.start import reduced
from samoe_hf.data import Video
from study import Study
from study_methods import LABELS, SEQUENTIAL
from study_plan import cropped, halves, read_plan
from study_report import compare_with_ours, summarize_methods, write_report

CONFIG = ROOT / "scripts" / "study" / "study_forgetting.yaml"


def tiny_config(folder, **changes):
    """The repository's study at the smallest sizes, which learns nothing."""
    content = yaml.safe_load(CONFIG.read_text())
    content["model_config"] = str(ROOT / "configs" / "model_nano.yaml")
    sizes = {"steps": 2, "base_steps": 1, "batch_size": 1, "num_frames": 2, "eval_videos": 1, "eval_frames": 2}
    content["quick"] |= sizes | {"gate_videos": 8, "router_frames": 4, "timing_frames": 2} | changes
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# --- The plan


# --- Videos


def test_videos_are_cropped_around_their_objects_and_resized():
    frames, masks = np.zeros((6, 80, 120, 3), np.uint8), np.zeros((6, 1, 80, 120), bool)
    masks[2:5, 0, 10:20, 100:110] = True
    frames[2:5, 10:20, 100:110] = 200
    video = Video.from_arrays("lesion", frames, masks, domain="ct")
    small = cropped(video, 4.0)
    assert small.size == (40, 40) and small.visible(2) == [1]
    mask = small.masks(2)[0]
    assert mask.sum() == 100 and np.asarray(small.frames[2])[mask].min() == 200  # 10 of 40 pixels, at full size
    assert reduced(video, 40, range(6)).masks(2).sum() == 5 * 4  # a half and a third of the size, rounded


def test_volumes_are_halved_at_their_largest_mask():
    frames = np.arange(7, dtype=np.uint8)[:, None, None] * np.ones((7, 20, 20), np.uint8)
    masks = np.zeros((7, 1, 20, 20), bool)
    for t, side in {1: 3, 2: 6, 3: 9, 4: 4}.items():
        masks[t, 0, :side, :side] = True
    onward, back = halves(Video.from_arrays("lesion", frames, masks, domain="ct"))
    assert [half.video_id for half in (onward, back)] == ["lesion_onward", "lesion_back"]
    assert [int(frame[0, 0, 0]) for frame in onward.frames] == [3, 4]
    assert [int(frame[0, 0, 0]) for frame in back.frames] == [3, 2, 1]
    assert [int(back.masks(t).sum()) for t in range(3)] == [81, 36, 9]


# --- Figures


def entries(final_blobs, method="full"):
    """A run over two domains: `blobs`, then `stripes`; J, F and J&F are equal."""
    stages = [
        {"shapes": 0.9, "blobs": 0.1, "stripes": 0.1},
        {"shapes": 0.8, "blobs": 0.7, "stripes": 0.2},
        {"shapes": 0.6, "blobs": final_blobs, "stripes": 0.5},
    ]
    return [
        {"method": method, "order": "blobs-stripes", "seed": 0, "stage": stage, "domain": name}
        | dict.fromkeys(("J", "F", "J&F"), x)
        for stage, scores in enumerate(stages)
        for name, x in scores.items()
    ]


@pytest.fixture
def plan(tmp_path):
    return read_plan(tiny_config(tmp_path, orders=[["blobs", "stripes"]]), quick=True)


def test_gain_and_forgetting(plan):
    summary = summarize_methods(entries(0.4), plan)["full"]
    assert summary["J&F"]["gain"]["mean"] == pytest.approx(100 * (0.3 + 0.4) / 2)
    assert summary["J&F"]["forgetting"]["mean"] == pytest.approx(100 * (0.3 + 0.3) / 2)
    assert summary["J&F"]["gain"]["std"] is None and summary["final"]["stripes"] == pytest.approx(50)
    second = [{**entry, "seed": 1} for entry in entries(0.6)]
    both = summarize_methods([*entries(0.4), *second], plan)["full"]
    assert both["runs"] == 2 and both["J&F"]["gain"]["mean"] == pytest.approx(40)
    assert both["J&F"]["gain"]["std"] == pytest.approx(10 / 2**0.5)


def test_the_report_says_what_beats_ours(plan):
    summary = summarize_methods([*entries(0.4, "domains"), *entries(0.6, "full")], plan)
    text = compare_with_ours(summary, ["shapes", "blobs", "stripes"])
    assert (
        "full fine-tuning beats domains with the gate in gain (by 10.0 points), forgetting (less by 10.0 points)"
        in text
    )
    assert "the final score on blobs (by 20.0 points)" in text and "shapes" not in text
    summary = summarize_methods([*entries(0.7, "domains"), *entries(0.6, "full")], plan)
    assert "No method of the table beats" in compare_with_ours(summary, ["shapes", "blobs", "stripes"])


# --- Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny study that is finished: its plan and folder."""
    folder = tmp_path_factory.mktemp("study")
    plan = read_plan(tiny_config(folder, orders=[["blobs", "echoes"]]), quick=True)
    Study(plan, folder / "out", show_progress_bar=False).run()
    return plan, folder / "out"


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("seed_*/**/*") if path.is_file()}


@pytest.mark.slow
def test_a_study_scores_all_methods_on_all_domains_after_every_stage(finished):
    _, folder = finished
    results = json.loads((folder / "results.json").read_text())
    keys = {(e["method"], e["stage"], e["domain"]) for e in results["entries"]}
    assert keys == {(m, s, d) for m in LABELS for s in range(3) for d in ("shapes", "blobs", "echoes")}
    assert set(results["summary"]) == set(LABELS)
    added = results["added"]
    sizes = {name: added[name]["parameters"] for name in ("lora", "own_lora", "moe", "frozen_experts")}
    assert max(sizes.values()) < 1.3 * min(sizes.values())  # routers make the difference
    assert added["full"]["parameters"] > 1_500_000 > added["memory"]["parameters"] > 100_000
    assert added["domains"]["bytes"] >= added["own_lora"]["bytes"] and added["base"]["parameters"] == 0
    assert set(results["gate"]["confusion"]) == {"shapes", "blobs", "echoes"}
    assert set(results["gate"]["by_seed"]["0"]["unseen"]) == {"blobs", "echoes"}
    assert set(results["gate"]["by_seed"]["0"]["wrong_experts"]) == {"blobs", "echoes"}
    report = (folder / "report.md").read_text()
    assert all(label in report for label in LABELS.values())
    for name in ("gain_and_forgetting.png", "stages.png", "gate.png"):
        assert f"]({name})" in report and (folder / name).stat().st_size > 10_000


@pytest.mark.slow
def test_a_study_goes_on_with_what_is_missing(finished):
    plan, folder = finished
    before, results = modified(folder), (folder / "results.json").read_text()
    lost = [folder / "seed_0" / "order_blobs-echoes" / name / "stage_2.json" for name in ("full", "token_routers")]
    for path in lost:
        path.unlink()
    Study(plan, folder, show_progress_bar=False).run()
    assert json.loads((folder / "results.json").read_text()) == json.loads(results)
    assert {path for path, time in modified(folder).items() if before[path] != time} == set(lost)


@pytest.mark.parametrize("name", ["seed_0/../../evil.json", "{folder}/seed_0/evil.json", "x/seed_0/evil.json"])
def test_results_with_files_elsewhere_are_refused(tmp_path, plan, name):
    results = write_report(plan, tmp_path / "out")
    results["units"] = {"seed_0/base.json": {}, name.format(folder=tmp_path): {}}
    (tmp_path / "out" / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"evil.json' in `units`, which is no file of a study"):
        Study(plan, tmp_path / "out", show_progress_bar=False)
    assert not [path for path in tmp_path.rglob("*.json") if path.name in ("evil.json", "base.json")]


def run(*arguments):
    run_study.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--root", "davis"], "`--root` must be DOMAIN=DIR, got 'davis'"),
        (["--root", f"night={ROOT}"], "`--root` names 'night'"),
        (["--seeds", "7"], "`--seeds` has 7, which is none of the study's"),
    ],
)
def test_wrong_options_are_named(tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        run(CONFIG, "--output", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_quick_study_runs(tmp_path, capsys):
    """About ten minutes on two cores."""
    run(CONFIG, "--quick", "--output", tmp_path, "--device", "cpu")
    assert "# Learning domain after domain" in capsys.readouterr().out
    summary = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert set(summary) == set(LABELS) >= set(SEQUENTIAL)
