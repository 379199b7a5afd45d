"""What a `results.json` says, for readers: a table, a report with pictures, and the metadata of a model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from samoe_hf.errors import InputError
from samoe_hf.model.weights_io import write_text
from samoe_hf.plots.evaluation import plot_by_size, plot_over_time

# Name in the results -> heading, and what it is. All are shares from 0 to 1 but the decays.
METRICS = {
    "J&F_mean": ("J&F", "mean of J and F"),
    "J_mean": ("J", "region similarity: intersection over union of predicted and true mask (DAVIS)"),
    "J_recall": ("J recall", "share of frames with J above 0.5"),
    "J_decay": ("J decay", "mean J of an object's first quarter of frames less that of its last; lower is better"),
    "F_mean": ("F", "boundary accuracy: harmonic mean of the shares of the predicted and of the true boundary that lie "
               "within 0.8 % of the image's diagonal of the other (DAVIS)"),
    "F_recall": ("F recall", "share of frames with F above 0.5"),
    "F_decay": ("F decay", "as J decay; lower is better"),
    "dice": ("Dice", "twice the intersection over the sum of both areas, per frame"),
    "boundary_iou": ("boundary IoU", "IoU of the bands inside both boundaries, 2 % of the diagonal wide"),
    "pixel_iou": ("pixel IoU", "intersection over union of the pixels of all objects and frames together"),
    "precision": ("precision", "share of predicted masks with an IoU above 0.5"),
    "recall": ("recall", "share of true masks with an IoU above 0.5"),
    "F1": ("F1", "harmonic mean of precision and recall"),
    "PQ": ("PQ", "panoptic quality, SQ × RQ"),
    "SQ": ("SQ", "mean IoU of the masks with an IoU above 0.5"),
    "RQ": ("RQ", "recognition quality, equal to F1"),
    "AP": ("AP", "share of masks with an IoU above a threshold, averaged over 0.50, 0.55, … 0.95"),
    "AP50": ("AP@0.5", "that share at 0.5"),
    "AP75": ("AP@0.75", "that share at 0.75"),
    "AP90": ("AP@0.9", "that share at 0.9"),
    "occlusion_accuracy": ("occlusion accuracy", "share of frames on which the object score says rightly whether the "
                           "object is to be seen"),
    "dice_3d": ("3-D Dice", "Dice of a whole volume, all annotated slices at once, the prompted one among them"),
    "surface_dice": ("surface Dice", "share of both surfaces, in mm², that lies within {tolerance:g} mm of the other"),
}  # fmt: skip
SHORT = ("J&F_mean", "J_mean", "F_mean", "dice", "boundary_iou", "dice_3d", "surface_dice")
PROTOCOLS = {
    "davis": "DAVIS: all frames of a video but the first and the last",
    "sav": "SA-V: without first and last frame, from an object's first appearance on",
    "youtube_vos": "YouTube-VOS: for each object, the frames after the first that shows it",
    "all": "all frames, prompted ones too",
}
PROMPTS = {
    "mask": "the object's true mask",
    "box": "the bounding box of its true mask",
    "point": "positive points drawn from its true mask",
    "clicks": "clicks in the middle of the largest error so far",
}
NO_NUMBER = "–"


def format_number(value: float | None, digits: int = 3) -> str:
    """A figure for a table; a dash for what is not a number."""
    return NO_NUMBER if value is None or value != value else f"{round(value, digits) + 0.0:.{digits}f}"


def format_table(heading: Sequence[str], rows: Iterable[Sequence[str]], markdown: bool = False) -> str:
    """A table with the first column to the left, the others to the right."""
    lines = [list(heading), *(list(map(str, row)) for row in rows)]
    if markdown:
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        rule = ["---", *["---:"] * (len(heading) - 1)]
        return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def summary_table(results: Mapping[str, Any], markdown: bool = False) -> str:
    """Models and their domains, by the main metrics."""
    names = _present(results["models"], SHORT)
    several = len(results["models"]) > 1

    def row(name: str, about: Mapping[str, Any]) -> list[str]:
        summary = about["summary"]
        counts = [str(int(summary[key])) for key in ("num_videos", "num_objects")]
        return [name, *counts, *(_with_std(about, metric) for metric in names)]

    rows = []
    for model in results["models"]:
        domains = model["domains"]
        if len(domains) != 1:
            rows += [row(f"{model['label']}: {d}" if several else d, about) for d, about in domains.items()]
        rows.append(row(model["label"] if several or len(domains) == 1 else "all", model))
    return format_table(["", "videos", "objects", *(METRICS[name][0] for name in names)], rows, markdown)


def comparison_table(comparison: Mapping[str, Any], markdown: bool = False) -> str:
    """The differences of two models with their intervals."""
    rows = [
        [
            METRICS[name][0],
            _signed(entry["difference"]),
            NO_NUMBER if entry["low"] is None else f"{_signed(entry['low'])} … {_signed(entry['high'])}",
        ]
        for name, entry in comparison["metrics"].items()
    ]
    return format_table(["metric", "difference", "95 % interval"], rows, markdown)


def _present(models: Sequence[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    return [name for name in names if any(model["summary"].get(name) is not None for model in models)]


def _with_std(about: Mapping[str, Any], name: str) -> str:
    value = format_number(about["summary"].get(name))
    std = (about.get("std") or {}).get(name)
    return value if value == NO_NUMBER or std is None else f"{value} ± {format_number(std)}"


def _signed(value: float | None) -> str:
    return NO_NUMBER if value is None else f"{round(value, 3) + 0.0:+.3f}"


def write_report(results: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes `report.md` and its plots beside a `results.json`.

    Args:
        results: as read from the file, so without NaN.
        folder: where the pictures of its highlights are too.

    Returns:
        The report's path.
    """
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    plot_over_time(results["models"], folder / "pictures" / "j_over_time.png")
    plot_by_size(results["models"], folder / "pictures" / "j_by_size.png")
    several = len(results["models"]) > 1
    parts = [
        "# Evaluation",
        _described(results),
        "## Results",
        summary_table(results, markdown=True),
        _explanations(results),
    ]
    for comparison in results["comparisons"]:
        parts += [
            f"### {comparison['model']} against {comparison['baseline']}",
            comparison_table(comparison, markdown=True),
            f"Differences of means over the same {comparison['num_objects']} objects; above 0 is better. "
            + (
                f"The interval is that of a paired bootstrap over the {comparison['num_videos']} videos "
                f"({results['bootstrap_samples']} draws)."
                if comparison["num_videos"] > 1
                else "A single video gives no interval."
            ),
        ]
    parts += ["### All metrics", _all_metrics(results)]
    if any("groups" in model["summary"] for model in results["models"]):
        parts += ["### Seen and unseen categories", _groups(results)]
    parts += [
        "## Over time and by size",
        "![J by the number of frames since the object's first](pictures/j_over_time.png)",
        "![J by the size of the object](pictures/j_by_size.png)",
    ]
    for model in results["models"]:
        of = f" of {model['label']}" if several else ""
        parts += [f"## Best and worst objects{of}", *_highlights(model)]
    for model in results["models"]:
        of = f" of {model['label']}" if several else ""
        parts += [f"## Videos{of}", _video_table(model), f"## Objects{of}", _object_table(model)]
    path = folder / "report.md"
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _described(results: Mapping[str, Any]) -> str:
    dataset, prompt = results["dataset"], results["prompt"]
    where = " ".join(f"{name} `{dataset[name]}`" for name in ("root", "split", "option") if dataset.get(name))
    lines = [f"- Data: `{dataset['kind']}`{', ' + where if where else ''}"]
    if prompt is not None:
        seeds = results["seeds"]
        drawn = (
            f"{len(seeds)} runs with the seeds {', '.join(map(str, seeds))}" if seeds else "nothing is drawn: one run"
        )
        description = f"{PROMPTS[prompt.partition(':')[0]]}, on the first annotated frame that shows it"
        if "@" in prompt:
            description += " and on others with " + (
                "the lowest IoU" if prompt.endswith(":offline") else "an IoU below 0.75"
            )
        lines.append(f"- Prompt: `{prompt}`, {description}; {drawn}")
    lines.append(f"- Frames that count: {PROTOCOLS[results['protocol']]} (`{results['protocol']}`)")
    for model in results["models"]:
        facts = [f"`{model['source']}`"]
        if model.get("base_model"):
            facts.append(f"on the base `{model['base_model']['name_or_path']}`")
        if model.get("commit") or model.get("revision"):
            facts.append(f"revision `{model.get('commit') or model['revision']}`")
        if model.get("num_parameters"):
            facts.append(f"{model['num_parameters']:,} parameters, fingerprint `{model['fingerprint']}`")
        if model.get("domains"):
            facts.append(f"experts for {', '.join(model['domains'])}")
        elif model.get("num_experts"):
            facts.append(f"{model['num_experts']} experts of rank {model['lora_rank']} per layer")
        if model["speed"]["fps"]:
            facts.append(f"{model['speed']['fps']:.1f} frames per second")
        lines.append(f"- {'Model' if prompt is not None else 'Masks'} {model['label']}: {', '.join(facts)}")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines.append(f"- Made {results['created']} on {results['device']}, with {versions}")
    return "\n".join(lines)


def _explanations(results: Mapping[str, Any]) -> str:
    notes = ["Means over objects, from 0 to 1, higher is better; every metric is explained below."]
    notes.append("A frame on which an object is neither to be seen nor predicted counts as 1 (DAVIS).")
    if any(model.get("std") for model in results["models"]):
        notes.append("After ±: the standard deviation over the seeds (n − 1).")
    total = sum(video["num_objects"] for video in results["models"][0]["videos"])
    counted = int(results["models"][0]["summary"]["num_objects"])
    if counted < total:
        notes.append(f"{total - counted} of {total} objects have no frame that counts and are left out.")
    return " ".join(notes)


def _all_metrics(results: Mapping[str, Any]) -> str:
    models = results["models"]
    tolerance = results.get("surface_tolerance") or 0
    rows = [
        [METRICS[name][0], *(_with_std(model, name) for model in models), METRICS[name][1].format(tolerance=tolerance)]
        for name in _present(models, METRICS)
    ]
    table = format_table(["metric", *(model["label"] for model in models), "what it is"], rows, markdown=True)
    # What a metric is reads better to the left.
    return table.replace("| " + " | ".join(["---", *["---:"] * (len(models) + 1)]), "| " + " | ".join(
        ["---", *["---:"] * len(models), "---"]
    ), 1)  # fmt: skip


def _groups(results: Mapping[str, Any]) -> str:
    rows = []
    for model in results["models"]:
        summary = model["summary"]
        for group, scores in summary["groups"].items():
            rows.append(
                [f"{model['label']}: {group}", *(format_number(scores[k]) for k in ("J&F_mean", "J_mean", "F_mean"))]
            )
        rows.append([f"{model['label']}: overall", format_number(summary["overall"]), "", ""])
    return format_table(["", "J&F", "J", "F"], rows, markdown=True)


def _highlights(model: Mapping[str, Any]) -> list[str]:
    parts = []
    for entry in model["highlights"]:
        name, _, number = entry["rank"].partition("_")
        what = f"{entry['domain']}, {entry['video']}, object {entry['object_id']}"
        score = format_number(entry["J&F_mean"])
        parts.append(f"**{name.capitalize()} {number}**: {what}; J&F {score} ([video]({entry['video_file']}))")
        parts.append(f"![{name} {number}: {what}]({entry['picture']})")
    return parts or ["No object has a frame that counts."]


def _video_table(model: Mapping[str, Any]) -> str:
    names = [name for name in SHORT if any(video.get(name) is not None for video in model["videos"])]
    rows = [
        [
            video["video"],
            video["domain"],
            video["num_frames"],
            video["num_objects"],
            f"{video['num_prompts']:g}",
            *(format_number(video.get(name)) for name in names),
            format_number(video["fps"], 1),
        ]
        for video in model["videos"]
    ]
    heading = ["video", "domain", "frames", "objects", "prompts", *(METRICS[name][0] for name in names), "frames/s"]
    return format_table(heading, rows, markdown=True)


def _object_table(model: Mapping[str, Any]) -> str:
    names = [name for name in (*SHORT, "J_recall", "J_decay") if any(o.get(name) is not None for o in model["objects"])]
    rows = [
        [
            row["video"],
            row["domain"],
            row["object_id"],
            NO_NUMBER if row["first_frame"] is None else row["first_frame"],
            row["num_frames"],
            f"{100 * row['relative_area']:.2g} %",
            *(format_number(row.get(name)) for name in names),
        ]
        for row in sorted(model["objects"], key=lambda row: -1 if row["J&F_mean"] is None else -row["J&F_mean"])
    ]
    heading = [
        "video",
        "domain",
        "object",
        "first frame",
        "frames counted",
        "size",
        *(METRICS[name][0] for name in names),
    ]
    return format_table(heading, rows, markdown=True) + "\n\nSize: the true mask's mean share of the image."


def eval_results(results: Mapping[str, Any], label: str | None = None) -> list[EvalResult]:
    """A model's figures by domain, for `huggingface_hub.ModelCardData(eval_results=...)`.

    Args:
        results: a parsed `results.json`, see `results.read_results`.
        label: of the model; the first by default.

    Raises:
        ValueError: if there is no model of that label.
    """
    models = {model["label"]: model for model in results["models"]}
    label = next(iter(models)) if label is None else label
    if label not in models:
        raise InputError(f"the results have no model {label!r}; there are {', '.join(models)}")
    dataset = results["dataset"]
    arguments = {"prompt": results["prompt"], "protocol": results["protocol"]}
    entries = []
    for domain, about in models[label]["domains"].items():
        for name in _present([about], SHORT):
            entries.append(
                EvalResult(
                    task_type="mask-generation",
                    task_name="Video object segmentation",
                    dataset_type=dataset["kind"],
                    dataset_name=domain,
                    dataset_config=domain,  # cards tell the data of two results apart by this, not by the name
                    dataset_split=dataset.get("split"),
                    dataset_args={key: value for key, value in arguments.items() if value is not None},
                    metric_type=name.lower().replace("&", "_and_"),
                    metric_name=METRICS[name][0],
                    metric_value=round(about["summary"][name], 4),
                )
            )
    return entries
