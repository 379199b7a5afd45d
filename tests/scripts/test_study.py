"""A study of forgetting: what it measures, and that it goes on where it was stopped."""

import json
import re

import pytest
import yaml

import run_study
from helpers.reference import ROOT
from study import Study
from study_methods import LABELS, SEQUENTIAL
from study_plan import read_plan
from study_report import collect, compare_with_ours, summarize_methods, write_report

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
    summary = summarize_methods([*entries(0.4, "auto"), *entries(0.6, "full")], plan)
    text = compare_with_ours(summary, ["shapes", "blobs", "stripes"])
    assert "full fine-tuning beats it in gain (by 10.0 points), forgetting (less by 10.0 points)" in text
    assert "the final score on blobs (by 20.0 points)" in text and "shapes" not in text
    summary = summarize_methods([*entries(0.7, "auto"), *entries(0.6, "full")], plan)
    assert "No method is ahead" in compare_with_ours(summary, ["shapes", "blobs", "stripes"])


def test_what_a_method_adds_is_the_mean_of_its_runs(plan, tmp_path):
    for seed, size in enumerate((10, 40)):
        files = {"base": {}}
        for stage in (1, 2):
            added = {"parameters": size * stage, "bytes": 4 * size * stage}
            files[f"order_blobs-stripes/auto/stage_{stage}"] = {"scores": {}, "added": added}
        for name, content in files.items():
            path = tmp_path / "out" / f"seed_{seed}" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    assert collect(plan, tmp_path / "out")[1]["auto"] == {"parameters": 50, "bytes": 200}


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
def test_chosen_ranks_take_no_more_bytes_than_the_studys_rank(finished):
    plan, folder = finished
    added = json.loads((folder / "results.json").read_text())["added"]
    assert added["auto"]["bytes"] <= added["domains"]["bytes"]
    for name in plan.orders[0]:
        (said,) = folder.glob(f"seed_0/own_lora/{name}*_sized/sizes.txt")
        assert "Sizes of the experts" in said.read_text()


@pytest.mark.slow
def test_methods_that_are_not_chosen_are_left_out(tmp_path):
    plan = read_plan(tiny_config(tmp_path, orders=[["blobs"]]), quick=True)
    Study(plan, tmp_path / "out", methods=["samcl"], show_progress_bar=False).run()
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["summary"]) == {"base", "samcl", "own_lora"}


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
        (["--root", "davis=nowhere"], "`--root` davis=nowhere names no folder"),
        (["--seeds", "7"], "`--seeds` has 7, which is none of the study's"),
    ],
)
def test_wrong_options_are_named(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(CONFIG, "--output", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_quick_study_runs(tmp_path, capsys):
    """About ten minutes on two cores."""
    run(CONFIG, "--quick", "--output", tmp_path, "--device", "cpu")
    assert "# Learning domain after domain" in capsys.readouterr().out
    summary = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert set(summary) == set(LABELS) >= set(SEQUENTIAL)
