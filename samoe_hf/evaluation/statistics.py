"""From the scores of videos to the figures of an evaluation: what `results.json` holds."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from samoe_hf.errors import InputError

from .evaluate import VideoResult
from .metrics import MAIN_METRICS, Protocol, counted_frames, score_objects, summarize

SIZE_EDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # of the image
BOOTSTRAP_SAMPLES = 10_000
FEWEST_VIDEOS = 6  # that have an interval
BAD_J = 0.5
NUM_HIGHLIGHTS = 2  # best and worst objects that are shown


def seen_and_unseen(meta: str | Path, train_meta: str | Path) -> dict[tuple[str, int], str]:
    """YouTube-VOS' groups, of its two `meta.json`: (video id, object id) -> "seen", in training, or "unseen"."""
    try:
        videos, train_videos = (
            json.loads(Path(path).read_text(encoding="utf-8"))["videos"] for path in (meta, train_meta)
        )
        categories = {o["category"] for video in train_videos.values() for o in video["objects"].values()}
        return {
            (video_id, int(object_id)): "seen" if about["category"] in categories else "unseen"
            for video_id, video in videos.items()
            for object_id, about in video["objects"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        message = (
            f"{meta} and {train_meta} must be meta.json of YouTube-VOS, with a category for each object: {error!r}"
        )
        raise InputError(message) from error


def combine_runs(
    runs: Mapping[int | None, Sequence[VideoResult]],
    protocol: Protocol,
    groups: Mapping[tuple[str, int], str] | None = None,
) -> dict[str, Any]:
    """The figures of one model or method.

    Args:
        runs: seed -> results of the same videos; a single one under None where nothing depends on a seed.
        groups: group of every (video id, object id).

    Returns:
        `summary` (means over the runs), `std` (sample standard deviation over the runs, None for one), `runs` (seed and
        summary of each), `domains` (summary and std of each), `videos`, `objects`, `over_time`, `by_size`,
        `where_to_look` and `speed`.
    """
    first, every = next(iter(runs.values())), [result for run in runs.values() for result in run]
    objects = [_mean(rows) for rows in zip(*(_object_rows(run, protocol) for run in runs.values()), strict=True)]
    counted = defaultdict(list)  # of each video
    for row in objects:
        if row["num_frames"]:
            counted[row["domain"], row["video"]].append(row)
    summaries = [_summary(run, protocol, groups) for run in runs.values()]
    of_domains = {
        domain: [_summary([r for r in run if r.domain == domain], protocol) for run in runs.values()]
        for domain in sorted({result.domain for result in first})
    }
    return {
        **_mean_and_std(summaries),
        "runs": [{"seed": seed, "summary": summary} for seed, summary in zip(runs, summaries, strict=True)],
        "domains": {domain: _mean_and_std(values) for domain, values in of_domains.items()},
        "videos": [
            _video_row(own, counted[own[0].domain, own[0].video_id]) for own in zip(*runs.values(), strict=True)
        ],
        "objects": objects,
        "over_time": _over_time(every, len(runs)),
        "by_size": _by_size(every, len(runs), protocol),
        "where_to_look": _where_to_look(every, protocol),
        "speed": _speed(every),
    }


def _summary(
    results: Sequence[VideoResult], protocol: Protocol, groups: Mapping[tuple[str, int], str] | None = None
) -> dict[str, Any]:
    objects = [(result, object_id) for result in results for object_id in result.scores.object_ids]
    keyed = groups and {(r.key, i): groups[r.video_id, i] for r, i in objects if (r.video_id, i) in groups}
    return summarize({result.key: result.scores for result in results}, protocol, keyed)


def _mean_and_std(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    std = _combine(summaries, lambda values: np.std(values, ddof=1)) if len(summaries) > 1 else None
    return {"summary": _mean(summaries), "std": std}


def _mean(values: Sequence[Any]) -> Any:
    """The mean of figures; what is the same in all stays as it is."""
    return _combine(values, lambda some: some[0] if all(value == some[0] for value in some) else float(np.mean(some)))


def _combine(values: Sequence[Any], function: Callable[[Sequence[Any]], Any]) -> Any:
    """One figure of several, or of mappings entry by entry."""
    if isinstance(values[0], Mapping):
        return {name: _combine([value[name] for value in values], function) for name in values[0]}
    return function(values)


def _object_rows(results: Sequence[VideoResult], protocol: Protocol) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        areas = result.scores.target_area
        for column, row in enumerate(score_objects({result.video_id: result.scores}, protocol)):
            frames = np.flatnonzero(areas[:, column])
            row |= {"domain": result.domain, "first_frame": result.frames[frames[0]] if frames.size else None}
            row["relative_area"] = float(areas[frames, column].mean() / result.image_area) if frames.size else 0.0
            rows.append(row)
    return rows


def _video_row(results: Sequence[VideoResult], counted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A video's row: the means over its objects that count. `results`: of the same video in each run."""
    first = results[0]
    row = {"domain": first.domain, "video": first.video_id, "num_objects": len(first.scores.object_ids)}
    row |= {"num_frames": first.num_frames, **_speed(results)}
    if first.experts_of is not None:
        row |= {name: getattr(first, name) for name in ("experts_of", "confidence", "rivals", "unknown")}
    row["num_prompts"] = float(np.mean([len(result.prompts) for result in results]))
    for name in MAIN_METRICS:
        if not counted or name in counted[0]:
            row[name] = float(pd.Series([one[name] for one in counted], dtype=float).mean())  # without those it has not
    return row


def _speed(results: Sequence[VideoResult]) -> dict[str, float]:
    seconds = sum(result.seconds for result in results)
    return {"seconds": seconds, "fps": sum(map(_num_tracked, results)) / seconds if seconds else math.nan}


def _num_tracked(result: VideoResult) -> int:
    """Frames from the first prompt on, before which nothing is tracked; none of a video without objects."""
    first = min((prompt["frame_idx"] for prompt in result.prompts), default=0)
    return result.num_frames - first if result.scores.object_ids else 0


def _over_time(results: Sequence[VideoResult], num_runs: int) -> dict[str, list[float]]:
    """J by the number of frames since the object's first: mean and quartiles over objects, and how many there are."""
    table = [
        (frame - result.frames[first], result.scores.j[row, column])
        for result in results
        for column, first in enumerate((result.scores.target_area > 0).argmax(axis=0))
        if result.scores.target_area[first, column]  # some are never there
        for row, frame in enumerate(result.frames[first + 1 :], first + 1)
    ]
    by_frame = pd.DataFrame(table, columns=["frame", "j"], dtype=float).groupby("frame").j
    return {
        "frames": [int(frame) for frame in by_frame.groups],
        "mean": by_frame.mean().tolist(),
        "lower_quartile": by_frame.quantile(0.25).tolist(),
        "upper_quartile": by_frame.quantile(0.75).tolist(),
        "objects": [float(count // num_runs) for count in by_frame.size()],
    }


def _by_size(results: Sequence[VideoResult], num_runs: int, protocol: Protocol) -> list[dict[str, Any]]:
    """J by the object's share of the image, over the frames that count and show it."""
    parts = [pd.DataFrame({"area": [], "j": []}, dtype=float)]
    for result in results:
        counted = counted_frames(result.scores, protocol) & (result.scores.target_area > 0)
        areas = result.scores.target_area[counted] / result.image_area
        parts.append(pd.DataFrame({"area": areas, "j": result.scores.j[counted]}))
    table, edges = pd.concat(parts), [0.0, *SIZE_EDGES, 1.0]
    bins = pd.cut(table.area, [*edges[:-1], math.inf], right=False)
    by_bin = table.j.groupby(bins, observed=False).agg(["size", "mean"])
    return [
        {"from": low, "to": high, "masks": int(count) // num_runs, "J_mean": mean}
        for (low, high), (count, mean) in zip(itertools.pairwise(edges), by_bin.to_numpy().tolist(), strict=True)
    ]


def _where_to_look(results: Sequence[VideoResult], protocol: Protocol) -> dict[str, float] | None:
    """How many bad masks, of a J below 0.5, are among the first tenth by doubt; None where nothing was doubted.

    `masks` that count, of an object on a frame, how many are `bad`, and the shares of these that are `found` and that
    could be, `best`. Of equal doubts each is as likely to be among the first.
    """
    parts = [np.zeros((2, 0))]
    for scores in (result.scores for result in results):
        if scores.doubts is not None:
            parts.append(np.stack([scores.j, scores.doubts])[:, counted_frames(scores, protocol)])
    j, doubts = np.concatenate(parts, axis=1)
    j, doubts = j[~np.isnan(doubts)], doubts[~np.isnan(doubts)]
    if not j.size:
        return None
    bad, first = j < BAD_J, math.ceil(len(j) / 10)
    limit = -np.partition(-doubts, first - 1)[first - 1]
    above, equal = doubts > limit, doubts == limit
    found = bad[above].sum() + bad[equal].mean() * (first - above.sum())
    shares = [float(count / bad.sum()) if bad.any() else math.nan for count in (found, min(first, bad.sum()))]
    return {"masks": len(j), "bad": int(bad.sum()), "found": shares[0], "best": shares[1]}


def compare_models(model: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """The difference of two models' means over objects, with a 95 % interval of a paired bootstrap over videos.

    Videos are drawn with replacement, the same ones for both models, and stand for all their objects that have the
    metric. The interval is of percentiles of 10 000 draws (seed 0): of many videos the 2.5 and the 97.5, and of fewer
    more extreme ones, as Student's distribution asks for (Hesterberg, 2015, "expanded percentile"). Of fewer than 6
    videos it is None: then the range of all differences holds the median of such videos in less than 95 % of cases.
    Both models are what [`combine_runs`] gives of the same videos, with their labels.
    """
    pairs = zip(model["objects"], baseline["objects"], strict=True)
    counted = [(a, b) for a, b in pairs if a["num_frames"] and b["num_frames"]]
    places = {key: place for place, key in enumerate(sorted({(a["domain"], a["video"]) for a, _ in counted}))}
    index = np.array([places[a["domain"], a["video"]] for a, _ in counted], dtype=int)
    metrics = {}
    for name in MAIN_METRICS:
        if not counted or not all(name in row for pair in counted for row in pair):
            continue
        difference = np.array([a[name] - b[name] for a, b in counted])
        known = ~np.isnan(difference)
        present, of_video = np.unique(index[known], return_inverse=True)
        difference, size, low, high = difference[known], len(present), None, None
        if not difference.size:
            continue
        if size >= FEWEST_VIDEOS:
            draws = np.random.default_rng(0).integers(0, size, (BOOTSTRAP_SAMPLES, size))
            total, count = np.bincount(of_video, weights=difference), np.bincount(of_video)
            tail = norm.cdf(t.ppf(0.025, size - 1) * (size / (size - 1)) ** 0.5)
            low, high = np.quantile(total[draws].sum(axis=1) / count[draws].sum(axis=1), (tail, 1 - tail)).tolist()
        metrics[name] = {"difference": float(difference.mean()), "low": low, "high": high}
    return {
        "model": model["label"],
        "baseline": baseline["label"],
        "num_videos": len(places),
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
    """Reads a `results.json`, or that of a folder."""
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or "models" not in results:
        raise InputError(f"{path} is no results.json of an evaluation: it has no `models`.")
    return results
