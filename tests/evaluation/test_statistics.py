"""The figures of an evaluation, against sums done by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from helpers.results import make_result
from samoe_hf.evaluation.statistics import (
    choose_highlights,
    combine_runs,
    compare_models,
    read_results,
    seen_and_unseen,
    to_json,
)


def test_means_are_over_objects_and_spreads_over_seeds():
    runs = {
        42: [make_result([[1, 1], [0.5, 0.1]], "a"), make_result([[1], [0.3]], "b", "e")],
        1042: [make_result([[1, 1], [0.7, 0.1]], "a"), make_result([[1], [0.3]], "b", "e")],
    }
    figures = combine_runs(runs, "youtube_vos")
    assert figures["summary"]["J_mean"] == pytest.approx((0.5 + 0.1 + 0.3 + 0.7 + 0.1 + 0.3) / 6)
    assert figures["std"]["J_mean"] == pytest.approx(np.std([0.3, 1.1 / 3], ddof=1))
    assert figures["domains"]["d"]["summary"]["J_mean"] == pytest.approx((0.5 + 0.1 + 0.7 + 0.1) / 4)
    assert figures["domains"]["e"]["std"]["J_mean"] == 0
    assert [run["seed"] for run in figures["runs"]] == [42, 1042]
    assert figures["runs"][1]["summary"]["J_mean"] == pytest.approx(1.1 / 3)
    of_object = {(row["video"], row["object_id"]): row["J_mean"] for row in figures["objects"]}
    assert of_object == pytest.approx({("a", 1): 0.6, ("a", 2): 0.1, ("b", 1): 0.3})
    assert [video["J_mean"] for video in figures["videos"]] == pytest.approx([0.35, 0.3])
    assert figures["speed"] == {"seconds": 8.0, "fps": 1.0}


def test_frames_per_second_are_of_frames_that_are_tracked():
    late = replace(make_result([[1]] * 3, "late"), prompts=[{"frame_idx": 2}])
    bare = make_result(np.zeros((3, 0)), "bare", seconds=0.0)
    figures = combine_runs({None: [make_result([[1]] * 3), late, bare]}, "youtube_vos")
    assert figures["speed"] == {"seconds": 4.0, "fps": 1.0}


def test_curves_run_from_each_objects_first_frame_and_sizes_are_shares_of_the_image():
    # The second object appears on frame 8 and the first leaves; the third is never there. Every fourth is annotated.
    j = [[1, 1, 1], [0.8, 1, 1], [0.6, 0.9, 1], [1, 0.4, 1]]
    target = [[100, 0, 0], [100, 0, 0], [95, 5000, 0], [0, 5, 0]]
    figures = combine_runs({None: [make_result(j, target=target, frames=[0, 4, 8, 12])]}, "youtube_vos")
    curve = figures["over_time"]
    assert curve["frames"] == [4, 8, 12] and curve["objects"] == [2, 1, 1]
    assert curve["mean"] == pytest.approx([0.6, 0.6, 1])
    assert curve["lower_quartile"][0] == pytest.approx(0.4 + 0.25 * 0.4)
    assert [row["first_frame"] for row in figures["objects"]] == [0, 8, None]
    sizes = figures["by_size"]
    assert [size["masks"] for size in sizes] == [1, 0, 1, 1, 0, 0, 0]
    assert [size["J_mean"] for size in sizes][:4] == pytest.approx([0.4, math.nan, 0.6, 0.8], nan_ok=True)
    assert sizes[0]["from"] == 0 and sizes[-1]["to"] == 1


def test_bad_masks_are_sought_where_the_doubt_is_largest():
    def result(j, doubts, video="v"):
        made = make_result(np.array(j)[:, None], video)
        return replace(made, scores=replace(made.scores, doubts=np.array(doubts)[:, None]))

    j, doubts = np.ones(22), np.linspace(0, 0.5, 22)
    doubts[0] = np.nan  # prompted; it counts under "all" alone
    j[[4, 9, 15, 21]], doubts[4], doubts[[9, 10]] = 0.4, 0.9, 0.7
    found = combine_runs({None: [result(j, doubts)]}, "all")["where_to_look"]
    # A tenth of 21 masks is 3: the fifth, and two with equal doubts, of which one is bad.
    assert found == pytest.approx({"masks": 21, "bad": 4, "found": 2 / 4, "best": 3 / 4})
    found = combine_runs({None: [result(j[:11], doubts[:11]), result(j[11:], doubts[11:], "w")]}, "all")[
        "where_to_look"
    ]
    assert found["masks"] == 21 and found["found"] == 2 / 4
    found = combine_runs({None: [result([1, 1, 0.2, 0.9], [np.nan, 0.3, 0.5, 0.5])]}, "all")["where_to_look"]
    assert found == {"masks": 3, "bad": 1, "found": 0.5, "best": 1.0}, "one of two equals is looked at"
    assert combine_runs({None: [make_result([[1], [0.4]])]}, "all")["where_to_look"] is None


def labelled(values, label, videos=None):
    rows = [
        {"domain": "d", "video": video, "object_id": i, "num_frames": 3}
        | dict.fromkeys(("J&F_mean", "J_mean", "F_mean", "dice", "boundary_iou"), float(value))
        for i, (video, value) in enumerate(zip(videos or map(str, range(len(values))), values, strict=True))
    ]
    return {"label": label, "objects": rows}


@pytest.mark.parametrize("count", [8, 40])
def test_differences_have_an_interval_over_videos(count):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.3, 0.9, count)
    better = base + 0.02 + 0.05 * rng.normal(size=count)
    compared = compare_models(labelled(better, "b"), labelled(base, "a"))
    entry = compared["metrics"]["J_mean"]
    assert (compared["model"], compared["baseline"], compared["num_videos"]) == ("b", "a", count)
    # As wide as that of Student's distribution: pairs differ far less than objects do.
    width = 2 * stats.t.ppf(0.975, count - 1) * stats.sem(better - base)
    assert entry["difference"] == pytest.approx((better - base).mean())
    assert entry["high"] - entry["low"] == pytest.approx(width, rel=0.1)
    assert (entry["low"] + entry["high"]) / 2 == pytest.approx(entry["difference"], abs=0.1 * width)


def test_an_interval_takes_videos_not_objects():
    videos, differences = [str(i // 50) for i in range(300)], np.repeat([0.1, -0.1] * 3, 50)
    few, alike = range(250), np.full(300, 0.5)
    entry = compare_models(labelled(alike + differences, "b", videos), labelled(alike, "a", videos))["metrics"]["dice"]
    assert entry["low"] < -0.09 and entry["high"] > 0.09, "300 objects are as many as their videos"
    # Even the range of all differences holds the median of such videos in 15 of 16 cases alone.
    models = [{**one, "objects": [one["objects"][i] for i in few]} for one in
              (labelled(alike + differences, "b", videos), labelled(alike, "a", videos))]  # fmt: skip
    assert compare_models(*models)["metrics"]["dice"] == {"difference": pytest.approx(0.02), "low": None, "high": None}


def test_objects_count_for_the_metrics_that_they_have():
    """Of two objects one goes and returns, so it alone has J&Ḟ_d and J&Ḟ_r."""
    target = np.full((6, 2), 100)
    target[2:4, 1] = 0
    models = []
    for label, found in (("a", 1.0), ("b", 0.5)):
        j = np.ones((6, 2))
        j[4:] = found
        runs = {None: [make_result(j, video, target=target) for video in ("v", "w")] + [make_result(j[:, :1], "x")]}
        models.append({"label": label, **combine_runs(runs, "davis")})
    returned = (51 / 101 + 0.5**3) / 2  # of the second frame with the object the protocol does not count
    assert models[1]["summary"]["J&F_reappear"] == pytest.approx(returned)
    assert [video["J&F_reappear"] for video in models[1]["videos"]] == pytest.approx(
        [returned] * 2 + [math.nan], nan_ok=True
    )
    compared = compare_models(models[1], models[0])["metrics"]
    assert compared["J&F_reappear"] == {"difference": pytest.approx(returned - 1), "low": None, "high": None}
    assert "J&F_disappear" in compared and "J_mose" not in compared
    alone = [{"label": one["label"], "objects": one["objects"][-1:]} for one in models]
    assert "J&F_reappear" not in compare_models(*alone)["metrics"]


@pytest.mark.parametrize("count, best, worst", [(0, 0, 0), (1, 1, 0), (2, 1, 1), (3, 2, 1), (4, 2, 2), (9, 2, 2)])
def test_highlights_show_each_object_once(count, best, worst):
    objects = labelled(np.linspace(0.9, 0.1, count), "a")["objects"]
    chosen = choose_highlights([*objects, {"num_frames": 0, "J&F_mean": math.nan}])
    assert [entry["rank"] for entry in chosen] == ["best_1", "best_2"][:best] + ["worst_1", "worst_2"][:worst]
    assert len({entry["video"] for entry in chosen}) == len(chosen)
    if count > 1:
        assert chosen[0]["video"] == "0" and chosen[best]["video"] == str(count - 1)


def test_categories_of_training_are_seen(tmp_path):
    train, meta, other = (tmp_path / name for name in ("train.json", "meta.json", "other.json"))
    train.write_text(json.dumps({"videos": {"x": {"objects": {"1": {"category": "dog"}}}}}))
    objects = {"1": {"category": "dog"}, "3": {"category": "snail"}}
    meta.write_text(json.dumps({"videos": {"a": {"objects": objects}}}))
    groups = seen_and_unseen(meta, train)
    assert groups == {("a", 1): "seen", ("a", 3): "unseen"}
    results = [make_result([[1, 1], [0.5, 0.1]], "a", object_ids=(1, 3))]
    summary = combine_runs({None: results}, "youtube_vos", groups)["summary"]
    assert summary["groups"]["seen"]["J_mean"] == 0.5 and summary["groups"]["unseen"]["J_mean"] == pytest.approx(0.1)
    assert summary["overall"] == pytest.approx(((0.5 + 0.25) / 2 + (0.1 + 0.01) / 2) / 2)
    with pytest.raises(ValueError, match=r"no group is given for the objects \[\('d/b', 1\)\]"):
        combine_runs({None: [make_result([[1], [0.5]], "b")]}, "youtube_vos", groups)
    for content in ('{"videos": []}', "{"):
        other.write_text(content)
        with pytest.raises(ValueError, match=r"other.json and .*train.json must be meta.json of YouTube-VOS"):
            seen_and_unseen(other, train)


def test_what_is_no_number_is_null_in_json(tmp_path):
    text = to_json({"models": [{"a": math.nan, 3: (1.0, -math.inf)}]})
    assert json.loads(text) == {"models": [{"a": None, "3": [1.0, None]}]}
    (tmp_path / "results.json").write_text(text)
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == json.loads(text)
    for wrong in ("{}", "[1]", "{"):
        (tmp_path / "results.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"results.json is"):
            read_results(tmp_path)
