"""What a `results.json` says, for readers: a table, a report with pictures, and the metadata of a model card."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from jinja2 import Template

from samoe_hf.plots.evaluation import plot_by_size, plot_over_time
from samoe_hf.whole_files import write_text

from .metrics import MAIN_METRICS, METRICS
from .statistics import FEWEST_VIDEOS

TEMPLATE = Path(__file__).with_name("report_template.md")
NO_NUMBER = "–"
# Of more videos, whose experts they got is counted.
MAX_CHOICES = 24


def format_number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A figure for a table, with a `sign` of "+" also above 0; a dash for what is not a number."""
    return NO_NUMBER if value is None or value != value else f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def plain(text: str) -> str:
    """A name for Markdown in which its characters, and those of HTML, mean nothing."""
    return re.sub(r"[\\`*<|\[\]]", r"\\\g<0>", text)


def format_table(
    heading: Sequence[str], rows: Iterable[Sequence[object]], markdown: bool = False, left: Collection[int] = (0,)
) -> str:
    """A table as text or Markdown; the columns `left` are aligned to the left."""
    lines = [list(heading), *(list(map(str, row)) for row in rows)]
    columns = range(len(heading))
    if markdown:
        lines = [list(map(plain, line)) for line in lines]
        lines.insert(1, ["---" if column in left else "---:" for column in columns])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[column]) for line in lines) for column in columns]
    return "\n".join(
        "  ".join(line[c].ljust(widths[c]) if c in left else line[c].rjust(widths[c]) for c in columns)
        for line in lines
    )


def summary_table(results: Mapping[str, Any], markdown: bool = False) -> str:
    """Models and their domains, by the main metrics."""
    models, rows = results["models"], []
    names = _present([model["summary"] for model in models], MAIN_METRICS)
    for model in models:
        prefix = f"{model['label']}: " if len(models) > 1 else ""
        parts = [(f"{prefix}{domain}", about) for domain, about in model["domains"].items()]
        parts = [] if len(parts) == 1 else parts
        for name, about in [*parts, (model["label"] if prefix or not parts else "all", model)]:
            counts = [int(about["summary"][key]) for key in ("num_videos", "num_objects")]
            rows.append([name, *counts, *(_with_std(about, metric) for metric in names)])
    return format_table(["", "videos", "objects", *_titles(names)], rows, markdown)


def describe_left_out(model: Mapping[str, Any]) -> str:
    """A sentence on objects, and whole videos, that are not scored; "" where all are."""
    there = {"objects": sum(video["num_objects"] for video in model["videos"]), "videos": len(model["videos"])}
    left = {kind: count - int(model["summary"][f"num_{kind}"]) for kind, count in there.items()}
    parts = [f"{left[kind]} of {count} {kind}" for kind, count in there.items() if left[kind]]
    return f"{' and '.join(parts)} have no frame that counts and are left out." if parts else ""


def comparison_table(comparison: Mapping[str, Any], markdown: bool = False) -> str:
    """The differences of two models with their intervals."""
    rows = []
    for name, entry in comparison["metrics"].items():
        difference, low, high = (format_number(entry[key], sign="+") for key in ("difference", "low", "high"))
        rows.append([METRICS[name].title, difference, low if low == NO_NUMBER else f"{low} … {high}"])
    return format_table(["metric", "difference", "95 % interval"], rows, markdown)


def describe_interval(comparison: Mapping[str, Any]) -> str:
    """A sentence on where the interval of a comparison comes from, or why there is none."""
    if (count := comparison["num_videos"]) < FEWEST_VIDEOS:
        return f"An interval takes {FEWEST_VIDEOS} videos, and there are {count}."
    return f"The interval is that of a paired bootstrap over {count} videos, widened for their number."


def _present(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """The metrics of which any of the rows has a number."""
    return [name for name in names if any(row.get(name) is not None for row in rows)]


def _titles(names: Iterable[str]) -> list[str]:
    return [METRICS[name].title for name in names]


def _with_std(about: Mapping[str, Any], name: str) -> str:
    value = format_number(about["summary"].get(name))
    std = (about["std"] or {}).get(name)
    return value if value == NO_NUMBER or std is None else f"{value} ± {format_number(std)}"


def write_evaluation_report(results: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes `report.md` and its plots beside a `results.json`, whose content is given, and returns its path."""
    folder, models = Path(folder), results["models"]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    plot_over_time(models, folder / "pictures" / "j_over_time.png")
    plot_by_size(models, folder / "pictures" / "j_by_size.png")
    shown = {
        "comparisons": [
            {**one, "table": comparison_table(one, markdown=True), "interval": describe_interval(one)}
            for one in results["comparisons"]
        ],
        "models": [
            {
                **model,
                "suffix": f" of {model['label']}" if len(models) > 1 else "",
                "videos_table": _video_table(model["videos"]),
                "objects_table": _object_table(model["objects"]),
            }
            for model in models
        ],
        "summary_table": summary_table(results, markdown=True),
        "metrics_table": _all_metrics(results),
        "groups_table": _groups(models) if any("groups" in model["summary"] for model in models) else "",
        "has_std": any(model.get("std") for model in models),
        "left_out": describe_left_out(models[0]),
    }
    template = Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    write_text(folder / "report.md", template.render({**results, **shown, "plain": plain}).strip() + "\n")
    return folder / "report.md"


def _all_metrics(results: Mapping[str, Any]) -> str:
    models, tolerance = results["models"], results.get("surface_tolerance") or 0
    rows = [
        [METRICS[name].title, *(_with_std(m, name) for m in models), METRICS[name].meaning.format(tolerance=tolerance)]
        for name in _present([model["summary"] for model in models], METRICS)
    ]
    heading = ["metric", *(model["label"] for model in models), "what it is"]
    return format_table(heading, rows, markdown=True, left=(0, len(heading) - 1))


def _groups(models: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for model in models:
        summary, label = model["summary"], model["label"]
        for group, scores in summary["groups"].items():
            rows.append([f"{label}: {group}", *(format_number(scores[k]) for k in ("J&F_mean", "J_mean", "F_mean"))])
        rows.append([f"{label}: overall", format_number(summary["overall"]), "", ""])
    return format_table(["", "J&F", "J", "F"], rows, markdown=True)


def _row_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], metrics: Sequence[str]) -> str:
    """A table of rows and their metrics; `columns`: heading -> how a row is written in it."""
    names = _present(rows, metrics)
    written = [
        [*(text.format_map(row) for text in columns.values()), *(format_number(row.get(name)) for name in names)]
        for row in rows
    ]
    return format_table([*columns, *_titles(names)], written, markdown=True)


def _video_table(videos: Sequence[Mapping[str, Any]]) -> str:
    columns = {"video": "{video}", "domain": "{domain}", "frames": "{num_frames}", "objects": "{num_objects}"}
    columns |= {"prompts": "{num_prompts:g}", "frames/s": "{speed}"}
    rows = [{**row, "speed": format_number(row["fps"], 1)} for row in videos]
    if any("experts_of" in row for row in videos):
        columns["experts of"] = "{chosen}"
        rows = [{**row, "chosen": describe_choice(*map(row.get, CHOICE))} for row in rows]
    return _row_table(rows, columns, MAIN_METRICS)


# What tells of a video whose experts it got, see [`describe_choice`].
CHOICE = ("experts_of", "confidence", "rivals", "unknown")


def describe_choice(
    experts_of: str | None,
    confidence: float | None,
    rivals: Mapping[str, float] | None = None,
    unknown: str | None = None,
) -> str:
    """Whose experts a video got, how sure the gate was, if it has decided, and which domains the video looks like.

    Args:
        unknown: "nearest" or "mix" where the video looks like no known domain, see [`SamoeConfig`].
    """
    sure = "" if confidence is None else f", {confidence:.0%} sure"
    among = ", ".join(f"{likelihood:.0%} {name}" for name, likelihood in (rivals or {}).items())
    return (_whose(experts_of, unknown) or NO_NUMBER) + sure + (f" ({among})" if among else "")


def _whose(experts_of: str | None, unknown: str | None) -> str | None:
    half = "half of " if unknown == "mix" else ""
    return experts_of if unknown is None else f"{half}{experts_of} (nearest: it is of no known domain)"


def describe_choices(videos: Mapping[str, Mapping[str, Any]]) -> str:
    """Whose experts videos got, by their names, a line for each that tells it; of many, how many got whose."""
    choices: dict[str, list[Any]] = {
        name: [video.get(key) for key in CHOICE] for name, video in videos.items() if "experts_of" in video
    }
    if len(choices) <= MAX_CHOICES:
        rows = [[name, describe_choice(*choice)] for name, choice in choices.items()]
        return format_table(["video", "experts of"], rows, left=(0, 1))
    sure: dict[str, list[float | None]] = {}
    for experts_of, confidence, _, unknown in choices.values():
        sure.setdefault(str(_whose(experts_of, unknown)), []).append(confidence)
    rows = []
    for name, values in sorted(sure.items()):
        known = [value for value in values if value is not None]
        rows.append([name, len(values), format_number(100 * sum(known) / len(known) if known else None, 0)])
    return format_table(["experts of", "videos", "% sure, on average"], rows)


def _object_table(objects: Sequence[Mapping[str, Any]]) -> str:
    columns = {"video": "{video}", "domain": "{domain}", "object": "{object_id}", "first frame": "{first}"}
    columns |= {"frames counted": "{num_frames}", "size": "{size:.2g} %"}
    rows = [
        {**row, "first": NO_NUMBER if row["first_frame"] is None else row["first_frame"]}
        | {"size": 100 * row["relative_area"]}
        for row in sorted(objects, key=lambda row: -1 if row["J&F_mean"] is None else -row["J&F_mean"])
    ]
    return _row_table(rows, columns, (*MAIN_METRICS, "J_recall", "J_decay"))


def eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """The first model's figures by domain, for `huggingface_hub.ModelCardData(eval_results=...)`."""
    dataset = results["dataset"]
    arguments = {key: results[key] for key in ("prompt", "protocol") if results[key] is not None}
    return [
        EvalResult(
            task_type="mask-generation",
            task_name="Video object segmentation",
            dataset_type=dataset["kind"],
            dataset_name=domain,
            dataset_config=domain,  # cards tell the data of two results apart by this, not by the name
            dataset_split=dataset.get("split"),
            dataset_args=arguments,
            metric_type=name.lower().replace("&", "_and_"),
            metric_name=METRICS[name].title,
            metric_value=round(about["summary"][name], 4),
        )
        for domain, about in results["models"][0]["domains"].items()
        for name in _present([about["summary"]], MAIN_METRICS)
    ]
