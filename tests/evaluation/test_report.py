"""Reports say what the results hold, and their pictures show it."""

import json
import re

import numpy as np
import pytest
from huggingface_hub import ModelCardData
from PIL import Image

from helpers.results import make_result
from samoe_hf.data import Video, read_video
from samoe_hf.evaluation import report
from samoe_hf.evaluation.report import (
    comparison_table,
    describe_choices,
    eval_results,
    format_number,
    summary_table,
    write_evaluation_report,
)
from samoe_hf.evaluation.statistics import choose_highlights, combine_runs, compare_models, to_json
from samoe_hf.plots.evaluation import ADDED, FOUND, MISSED, compare_masks, draw_object
from samoe_hf.plots.masks import HATCH


def make_results(models=1, seeds=(None,), **options):
    """A results.json of two videos in two domains, one of them a volume."""
    entries = []
    for number in range(models):
        shift = -0.05 * number
        runs = {
            seed: [
                make_result(np.array([[1, 1], [0.5, 0.9], [0.4, 0.8]]) + shift + 0.01 * i, "a|<b>", "photos"),
                make_result(np.array([[1], [0.3], [0.2]]) + shift, "lung", "ct", surface_dice=np.array([0.5 + shift])),
            ]
            for i, seed in enumerate(seeds)
        }
        entry = {"label": f"model_{number}", "source": f"org/model_{number}", "commit": "abc123"}
        entry |= {"num_parameters": 1234, "fingerprint": "f00", "num_experts": 4, "lora_rank": 8}
        entry |= combine_runs(runs, "youtube_vos")
        entry["highlights"] = choose_highlights(entry["objects"])
        for highlight in entry["highlights"]:
            path = f"pictures/{highlight['rank']}"
            highlight |= {"picture": f"{path}.png", "video_file": f"{path}.mp4"}
        entries.append(entry)
    results = {
        "created": "2026-01-01T00:00:00+00:00", "versions": {"torch": "2.11"}, "device": "cpu",
        "dataset": {"kind": "davis", "root": "/data", "split": "val", "domain": None, "option": []}, "prompt": "mask",
        "seeds": None if seeds == (None,) else list(seeds), "protocol": "youtube_vos", "surface_tolerance": 2.0,
        "bootstrap_samples": 10000, "models": entries,
        "comparisons": [compare_models(entry, entries[0]) for entry in entries[1:]],
    }  # fmt: skip
    return json.loads(to_json(results | options))


@pytest.fixture
def without_plots(monkeypatch):
    """Drawing takes most of a report's time."""
    for name in ("plot_over_time", "plot_by_size"):
        monkeypatch.setattr(report, name, lambda *_: None)


def cells(report, heading, row):
    """The cells of a Markdown table by its columns' names."""
    section = report.partition(f"# {heading}\n")[2]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in lines[0]]
    found = next(line for line in lines[2:] if line[0].strip() == row)
    return dict(zip(names, (cell.strip() for cell in found), strict=True))


def test_the_report_has_the_figures(tmp_path):
    path = write_evaluation_report(make_results(), tmp_path)
    text = path.read_text()
    assert path == tmp_path / "report.md"
    table = cells(text, "Results", "photos")
    assert (table["objects"], table["J"], table["3-D Dice"]) == ("2", "0.650", "–")
    assert cells(text, "Results", "ct")["surface Dice"] == "0.500"
    assert cells(text, "Results", "all")["J"] == format_number((0.45 + 0.85 + 0.25) / 3)
    assert "within 2 mm of the other" in cells(text, "All metrics", "surface Dice")["what it is"]
    assert cells(text, "Videos", r"a\|\<b>")["J"] == "0.650" and r"photos, a\|\<b>, object 2; J&F" in text
    assert cells(text, "Objects", "lung")["J"] == "0.250"
    for said in ("`org/model_0`", "`abc123`", "1,234 parameters", "`mask`", "the object's true mask", "torch 2.11",
                 "YouTube-VOS: for each object", "root `/data`, split `val`", "nothing is drawn: one run",
                 "4 experts of rank 8 per layer"):  # fmt: skip
        assert said in text, said
    assert text.index("Best 1") < text.index("Worst 1")
    assert all(link.startswith("pictures/") for link in re.findall(r"\]\((.*?)\)", text))
    for name in ("j_over_time.png", "j_by_size.png"):
        assert Image.open(tmp_path / "pictures" / name).size[0] > 600


def test_several_models_and_seeds_are_told_apart(tmp_path, without_plots):
    results = make_results(models=2, seeds=(42, 1042))
    lines = summary_table(results).splitlines()
    assert [line.split()[0] for line in lines[1::3]] == ["model_0:", "model_1:"] and lines[3].startswith("model_0  ")
    assert "-0.050" in comparison_table(results["comparisons"][0])
    text = write_evaluation_report(results, tmp_path).read_text()
    assert "2 runs with the seeds 42, 1042" in text and "standard deviation over the seeds" in text
    assert cells(text, "Results", "model_0: photos")["J"] == "0.655 ± 0.007"
    assert cells(text, "Results", "model_1")["J"].startswith(format_number(np.mean([0.455, 0.855, 0.25]) - 0.05))
    compared = cells(text, "model_1 against model_0", "J")
    assert compared["difference"] == "-0.050" and compared["95 % interval"] == "–"
    assert "above 0 is better. An interval takes 6 videos, and there are 2." in text
    (comparison,) = results["comparisons"]
    comparison |= {"num_videos": 6, "metrics": {"J_mean": {"difference": -0.05, "low": -0.1, "high": 0.01}}}
    text = write_evaluation_report(results, tmp_path).read_text()
    assert cells(text, "model_1 against model_0", "J")["95 % interval"] == "-0.100 … +0.010"
    assert "bootstrap over 6 videos" in text
    assert "## Videos of model_1" in text and "## Best and worst objects of model_0" in text


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("clicks:3", "that shows it; nothing"),
        ("clicks:3@4", "shows it and on others with an IoU below 0.75; nothing"),
        ("clicks:3@4:look", "shows it and on others that are most worth a look; nothing"),
        ("mask@4:even", "the object's true mask, on the first annotated frame that shows it and on others at even"),
    ],
)
def test_where_to_look_and_what_was_corrected_are_told(tmp_path, without_plots, prompt, said):
    results = make_results(models=3, prompt=prompt)
    assert "Where to look" not in write_evaluation_report(results, tmp_path).read_text()
    results["models"][0]["where_to_look"] = {"masks": 200, "bad": 40, "found": 0.4, "best": 0.5}
    results["models"][1]["where_to_look"] = {"masks": 200, "bad": 0, "found": None, "best": None}
    text = " ".join(write_evaluation_report(results, tmp_path).read_text().split())
    assert "model_0: 40 of 200 masks have a J below 0.5; 40 % of these are among the tenth with the largest" in text
    assert "(10 % by chance, 50 % at best) - model_1: none of 200 masks has a J below 0.5 ##" in text
    assert said in text


def test_of_many_videos_those_of_no_known_domain_are_told_apart():
    choices = [*[("a", 0.9, None)] * 20, *[("a", 0.2, "mix")] * 9, ("base", 0.7, None), ("b", None, None)]
    videos = {str(n): dict(zip(("experts_of", "confidence", "unknown"), x, strict=True)) for n, x in enumerate(choices)}
    rows = [re.split("  +", line) for line in describe_choices(videos).splitlines()]
    stranger = ["half of a (nearest: it is of no known domain)", "9", "20"]
    assert rows[1:] == [["a", "20", "90"], ["b", "1", "–"], ["base", "1", "70"], stranger]


def test_results_go_into_a_model_card():
    results = make_results(models=2)
    card = ModelCardData(model_name="m", eval_results=eval_results(results))
    index = card.to_dict()["model-index"][0]["results"]
    assert [entry["dataset"]["name"] for entry in index] == ["ct", "photos"]
    assert index[0]["dataset"]["args"] == {"prompt": "mask", "protocol": "youtube_vos"}
    assert index[0]["dataset"]["split"] == "val" and index[0]["dataset"]["type"] == "davis"
    assert {metric["name"] for metric in index[0]["metrics"]} >= {"J&F", "3-D Dice", "surface Dice"}
    values = {metric["name"]: metric["value"] for metric in index[1]["metrics"]}
    assert values["J"] == 0.65 and "3-D Dice" not in values


def test_colours_tell_what_was_found_missed_and_added():
    frame = np.full((20, 40, 3), 255, dtype=np.uint8)
    target, prediction = np.zeros((2, 20, 40), dtype=bool)
    target[5:15, 5:20], prediction[5:15, 12:30] = True, True
    picture = np.asarray(compare_masks(frame, prediction, target, 40)).astype(int)
    np.testing.assert_allclose(picture[10, 15], 0.4 * 255 + 0.6 * np.array(FOUND), atol=1)
    lines = {}
    for columns, color in ((slice(6, 12), MISSED), (slice(22, 28), ADDED)):
        drawn = (1 - HATCH) * 255 + HATCH * np.array(color)
        lines[color] = np.abs(picture[7:13, columns] - drawn).max(axis=-1) <= 1
        assert 0.1 < lines[color].mean() < 0.4
        assert (picture[7:13, columns].max(axis=-1) < 150).any()  # the shadow
    assert (lines[MISSED] == np.roll(lines[MISSED], (1, -1), (0, 1)))[1:, :-1].all()  # from lower left to upper right
    assert (lines[ADDED] == np.roll(lines[ADDED], (1, 1), (0, 1)))[1:, 1:].all()  # from upper left to lower right
    assert (picture[10, 4] == 255).all() and (picture[10, 3] == 0).all() and (picture[10, 2] == 255).all()
    unknown = np.asarray(compare_masks(frame, prediction, None, 80)).astype(int)
    assert unknown.shape == (40, 80, 3)
    np.testing.assert_allclose(unknown[20, 52], 0.4 * 255 + 0.6 * np.array(FOUND), atol=1)


@pytest.mark.parametrize("num_frames, size", [(1, (31, 45)), (7, (240, 135)), (2, (700, 30)), (2, (3, 2100))])
def test_objects_are_drawn_as_video_and_picture(num_frames, size, tmp_path):
    masks = np.zeros((num_frames, 2, *size), dtype=bool)
    masks[:, 1, 1:20, 3:20] = True
    video = Video.from_arrays("v" * 200, np.zeros((num_frames, *size, 3), np.uint8), masks, [4, 9])
    path = tmp_path / "p" / "best_1"
    j, strip = [1.0] * num_frames, list(range(num_frames))[-7:]
    draw_object(video, 9, lambda t: masks[t, 1], range(num_frames), j, strip, "title " * 40, path)
    overlay = read_video(tmp_path / "p" / "best_1.mp4")
    assert len(overlay) == num_frames and overlay.size[1] == {30: 82, 2100: 960}.get(size[1], 640)
    legend_and_text = overlay[0][:60]
    assert legend_and_text.mean() > 150 and (legend_and_text < 80).any()
    width, height = Image.open(tmp_path / "p" / "best_1.png").size
    assert width == 972 and height < 2000 and overlay.size[0] < 3000
