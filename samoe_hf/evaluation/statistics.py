"""From the scores of videos to the figures of an evaluation: what `results.json` holds."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from samoe_hf.errors import InputError

from .evaluate import VideoResult
from .metrics import Protocol, counted_frames, score_objects, summarize

SIZE_EDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # of the image
BOOTSTRAP_SAMPLES = 10_000
COMPARED = ("J&F_mean", "J_mean", "F_mean", "dice", "boundary_iou")
NUM_HIGHLIGHTS = 2  # best and worst objects that are shown


def seen_and_unseen(meta: Mapping[str, Any], train_meta: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """YouTube-VOS' groups: whether an object's category is one of the training split.

    Args:
        meta, train_meta: contents of the `meta.json` of the evaluated and of the training split.

    Returns:
        (video id, object id) -> "seen" or "unseen".

    Raises:
        ValueError: if one is not such a file.
    """
    try:
        categories = {o["category"] for video in train_meta["videos"].values() for o in video["objects"].values()}
        return {
            (video_id, int(object_id)): "seen" if about["category"] in categories else "unseen"
            for video_id, video in meta["videos"].items()
            for object_id, about in video["objects"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"not a meta.json of YouTube-VOS, with a category for each object: {error!r}") from error


def summarize_model(
    runs: Mapping[int | None, Sequence[VideoResult]],
    protocol: Protocol,
    groups: Mapping[tuple[str, int], str] | None = None,
) -> dict[str, Any]:
    """The figures of one model or method.

    Args:
        runs: seed -> results of the same videos; a single one under None where nothing depends on a seed.
        protocol: which frames count, see `counted_frames`.
        groups: group of every (video id, object id).

    Returns:
        `summary` (see `metrics.summarize`; means over the runs), `std` (sample standard deviation over the runs, None
        for one), `runs` (seed and summary of each), `domains` (summary and std of each), `videos`, `objects`,
        `over_time`, `by_size`, and `speed`. Of volumes the summaries and objects have `dice_3d` and `surface_dice` too.

    Raises:
        ValueError: if an object has no group (names it).
    """
    results = next(iter(runs.values()))
    objects = _mean_rows([_object_rows(run, protocol) for run in runs.values()])
    domains = sorted({result.domain for result in results})
    summaries = {seed: _summary(run, protocol, groups) for seed, run in runs.items()}
    return {
        **_mean_and_std(list(summaries.values())),
        "runs": [{"seed": seed, "summary": summary} for seed, summary in summaries.items()],
        "domains": {
            domain: _mean_and_std([_summary([r for r in run if r.domain == domain], protocol) for run in runs.values()])
            for domain in domains
        },
        "videos": _video_rows(runs, objects),
        "objects": objects,
        "over_time": _over_time(runs),
        "by_size": _by_size(runs, protocol),
        "speed": _speed([result for run in runs.values() for result in run]),
    }


def _summary(
    results: Sequence[VideoResult], protocol: Protocol, groups: Mapping[tuple[str, int], str] | None = None
) -> dict[str, Any]:
    by_key = {result.key: result for result in results}
    keyed = groups and {
        (result.key, i): groups[result.video_id, i]
        for result in results
        for i in result.scores.object_ids
        if (result.video_id, i) in groups
    }
    summary = summarize({key: result.scores for key, result in by_key.items()}, protocol, keyed)
    volumes = [result for result in results if result.surface_dice is not None]
    if volumes:
        summary["dice_3d"] = float(np.concatenate([result.scores.volume_dice for result in volumes]).mean())
        summary["surface_dice"] = float(np.concatenate([result.surface_dice for result in volumes]).mean())
    return summary


def _mean_and_std(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of the same figures of several runs."""

    def combine(values: list[Any], function: Callable[..., Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: combine([value[name] for value in values], function) for name in values[0]}
        return values[0] if len(values) == 1 else float(function(values))

    std = combine(summaries, partial(np.std, ddof=1)) if len(summaries) > 1 else None
    return {"summary": combine(summaries, np.mean), "std": std}


def _object_rows(results: Sequence[VideoResult], protocol: Protocol) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        scores = result.scores
        shown = scores.target_area > 0
        for column, row in enumerate(score_objects({result.video_id: scores}, protocol)):
            frames, areas = np.flatnonzero(shown[:, column]), scores.target_area[shown[:, column], column]
            row = {"domain": result.domain, **row, "first_frame": result.frames[frames[0]] if frames.size else None}
            row["relative_area"] = float(areas.mean() / result.image_area) if frames.size else 0.0
            if result.surface_dice is not None:
                row["dice_3d"] = float(scores.volume_dice[column])
                row["surface_dice"] = float(result.surface_dice[column])
            rows.append(row)
    return rows


def _mean_rows(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the same objects or videos, their figures averaged over runs."""

    def mean(values: Sequence[Any]) -> Any:
        return float(np.mean(values)) if isinstance(values[0], float) else values[0]

    return [{name: mean([row[name] for row in rows]) for name in rows[0]} for rows in zip(*runs, strict=True)]


def _video_rows(
    runs: Mapping[int | None, Sequence[VideoResult]], objects: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows_of = defaultdict(list)
    for row in objects:
        if row["num_frames"]:
            rows_of[row["domain"], row["video"]].append(row)
    names = ("J&F_mean", "J_mean", "F_mean", "dice", "boundary_iou", "dice_3d", "surface_dice")
    videos = []
    for results in zip(*runs.values(), strict=True):
        result, counted = results[0], rows_of[results[0].domain, results[0].video_id]
        row = {"domain": result.domain, "video": result.video_id, "num_objects": len(result.scores.object_ids)}
        row |= {"num_frames": result.num_frames, **_speed(results)}
        row["num_prompts"] = float(np.mean([len(r.prompts) for r in results]))
        for name in names:
            if not counted or name in counted[0]:
                row[name] = float(np.mean([c[name] for c in counted])) if counted else math.nan
        videos.append(row)
    return videos


def _speed(results: Sequence[VideoResult]) -> dict[str, float]:
    seconds = sum(result.seconds for result in results)
    return {"seconds": seconds, "fps": sum(r.num_frames for r in results) / seconds if seconds else math.nan}


def _over_time(runs: Mapping[int | None, Sequence[VideoResult]]) -> dict[str, list[float]]:
    """J by the number of frames since the object's first: mean and quartiles over objects, and how many there are."""
    tables = [pd.DataFrame({"frame": [], "j": []}).astype({"frame": int})]
    for result in (result for run in runs.values() for result in run):
        first = (result.scores.target_area > 0).argmax(axis=0)
        frames = np.array(result.frames)
        tables += [
            pd.DataFrame({"frame": frames[row + 1 :] - frames[row], "j": result.scores.j[row + 1 :, column]})
            for column, row in enumerate(first)
        ]
    by_frame = pd.concat(tables).groupby("frame")["j"]
    columns = {
        "frames": list(by_frame.groups),
        "mean": by_frame.mean().tolist(),
        "lower_quartile": by_frame.quantile(0.25).tolist(),
        "upper_quartile": by_frame.quantile(0.75).tolist(),
        "objects": (by_frame.size() // len(runs)).astype(float).tolist(),
    }
    return {name: [x if name == "frames" else float(x) for x in values] for name, values in columns.items()}


def _by_size(runs: Mapping[int | None, Sequence[VideoResult]], protocol: Protocol) -> list[dict[str, Any]]:
    """J by the object's share of the image, over the frames that count and show it."""
    areas, js = [np.zeros(0)], [np.zeros(0)]
    for result in (result for run in runs.values() for result in run):
        counted = counted_frames(result.scores, protocol) & (result.scores.target_area > 0)
        areas.append(result.scores.target_area[counted] / result.image_area)
        js.append(result.scores.j[counted])
    bins = pd.cut(np.concatenate(areas), [0.0, *SIZE_EDGES, np.inf], right=False)
    sizes = pd.Series(np.concatenate(js)).groupby(bins, observed=False).agg(["size", "mean"])
    edges = [0.0, *SIZE_EDGES, 1.0]
    return [
        {"from": low, "to": high, "masks": int(size) // len(runs), "J_mean": float(mean)}
        for low, high, size, mean in zip(edges[:-1], edges[1:], sizes["size"], sizes["mean"], strict=True)
    ]


def compare_models(model: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """The difference of two models' means over objects, with a 95 % interval of a paired bootstrap over videos.

    Videos are drawn with replacement, the same ones for both models, and stand for all their objects; the interval is
    that of the 2.5 and 97.5 percentiles of 10 000 draws (seed 0). With a single video there is none.

    Args:
        model, baseline: what [`summarize_model`] gives of the same videos, with their labels.
    """
    counted = [
        (a, b)
        for a, b in zip(model["objects"], baseline["objects"], strict=True)
        if a["num_frames"] and b["num_frames"]
    ]
    videos = sorted({(a["domain"], a["video"]) for a, _ in counted})
    index = np.array([videos.index((a["domain"], a["video"])) for a, _ in counted], dtype=int)
    draws = np.random.default_rng(0).integers(0, len(videos), (BOOTSTRAP_SAMPLES, len(videos))) if videos else None
    metrics = {}
    names = [n for n in (*COMPARED, "dice_3d", "surface_dice") if all(n in row for pair in counted for row in pair)]
    for name in names if videos else ():
        difference = np.array([a[name] - b[name] for a, b in counted])
        metrics[name] = {"difference": float(difference.mean()), "low": math.nan, "high": math.nan}
        if len(videos) > 1:
            total = np.bincount(index, weights=difference, minlength=len(videos))
            count = np.bincount(index, minlength=len(videos))
            means = total[draws].sum(axis=1) / count[draws].sum(axis=1)
            low, high = np.quantile(means, (0.025, 0.975))
            metrics[name] |= {"low": float(low), "high": float(high)}
    return {
        "model": model["label"],
        "baseline": baseline["label"],
        "num_videos": len(videos),
        "num_objects": len(counted),
        "metrics": metrics,
    }


def choose_highlights(objects: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The best and the worst objects by J&F, each at most once; the best first, then the worst, worst first."""
    ranked = sorted((row for row in objects if row["num_frames"]), key=lambda row: -row["J&F_mean"])
    best = ranked[: min(NUM_HIGHLIGHTS, (len(ranked) + 1) // 2)]
    worst = ranked[len(best) :][::-1][:NUM_HIGHLIGHTS]
    names = ("domain", "video", "object_id", "J&F_mean")
    return [
        {"rank": f"{name}_{number}", **{key: row[key] for key in names}}
        for name, rows in (("best", best), ("worst", worst))
        for number, row in enumerate(rows, 1)
    ]


def to_json(results: Any) -> str:
    """Results as JSON; what is not a number, such as a mean over nothing, becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): clean(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [clean(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(results), indent=1, allow_nan=False)


def read_results(path: str | Path) -> dict[str, Any]:
    """Reads a `results.json`, or that of a folder.

    Raises:
        ValueError: if it is none.
    """
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or "models" not in results:
        raise InputError(f"{path} is no results.json of an evaluation: it has no `models`.")
    return results
