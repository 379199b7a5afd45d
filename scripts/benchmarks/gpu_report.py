"""The report of all figures of a GPU: tables in Markdown, and pictures."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from measure import COLORS
from samoe_hf.evaluation.report import format_table
from samoe_hf.whole_files import whole_file, write_text

PUBLISHED = Path(__file__).parent / "published.yaml"


@dataclass
class GpuRun:
    """What a folder holds after a run. `failures`: task -> its error. `missing`: tasks for which no time was left."""

    machine: str
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def write_gpu_report(run: GpuRun, folder: Path) -> Path:
    """Writes `report.md` and its pictures; returns the report's path."""
    sections = [
        _tracking(run.results, folder),
        _experts(run.results),
        _training(run.results),
        _exactness(run.results),
        _not_measured(run),
    ]
    text = "\n\n".join(["# Measured on a GPU", run.machine, *(section for section in sections if section)])
    write_text(folder / "report.md", f"{text}\n")
    return folder / "report.md"


def _tracking(results: Mapping[str, Any], folder: Path) -> str:
    found: dict[str, dict[str, dict[int, float]]] = {}
    peaks: dict[tuple[str, int], int | None] = {}
    for task, result in results.items():
        if not task.startswith("track "):
            continue
        _, model, *words, objects = task.split()
        contender = " ".join(words)
        fps = 1 / statistics.median(result["seconds"])
        found.setdefault(model, {}).setdefault(contender, {})[int(objects)] = fps
        if contender == "samoe_hf":
            peaks[model, int(objects)] = result["peak_bytes"]
    if not found:
        return ""
    counts = sorted({n for by in found.values() for fps in by.values() for n in fps})
    heading = ["model", "contender", *(f"{n} object{'s' if n > 1 else ''}" for n in counts)]
    rows = [
        [model, contender, *(_number(fps.get(n)) for n in counts)]
        for model, by in found.items()
        for contender, fps in by.items()
    ]
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    lines = [
        f"- {' '.join(str(x[key]) for key in ('name', 'model') if key in x)}, objects: {x['objects']}, {x['gpu']}: "
        f"{x['fps']} ({x['source']})"
        for x in published
    ]
    _plot_tracking(found, published, folder / "tracking.png")
    memory = [
        [model, *(_gigabytes(peaks.get((model, n))) for n in counts)]
        for model in found
        if any(peaks.get((model, n)) for n in counts)
    ]
    text = f"""## Tracking: frames per second

At 1024 x 1024 by autocast to bfloat16, memory full, experts included in ours. Masks are resized to the frame's size.

{format_table(heading, rows, markdown=True)}

![Frames per second by number of objects](tracking.png)

Published elsewhere, not measured here:

{chr(10).join(lines)}"""
    if memory:
        table = format_table(["model", *heading[2:]], memory, markdown=True)
        text += f"\n\nThe most device memory of ours beyond the weights and the frames:\n\n{table}"
    return text


def _plot_tracking(
    found: Mapping[str, Mapping[str, Mapping[int, float]]], published: list[dict[str, Any]], path: Path
) -> None:
    figure = Figure(figsize=(4.2 * len(found), 4), layout="constrained")
    names = list(dict.fromkeys(contender for by in found.values() for contender in by))
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (model, by) in zip(panels, found.items(), strict=True):
        for contender, fps in by.items():
            style = "-" if contender.startswith("samoe") else "--"
            counts = sorted(fps)
            color = COLORS[names.index(contender) % len(COLORS)]
            axes.plot(counts, [fps[n] for n in counts], style, marker="o", ms=4, color=color, label=contender)
        for name, style in (("SAM 2.1", "k*"), ("SAM 3.1", "k:x")):
            others = [x for x in published if x["name"] == name and x.get("model", model) == model]
            if others:
                label = f"{name} on {others[0]['gpu']}, published"
                axes.plot([x["objects"] for x in others], [x["fps"] for x in others], style, label=label)
        axes.set_xscale("log", base=2)
        counts = sorted({n for fps in by.values() for n in fps} | {x["objects"] for x in published})
        axes.set_xticks(counts, map(str, counts))
        axes.set_yscale("log")
        axes.set_xlabel("objects")
        axes.set_title(model)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("frames per second")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _experts(results: Mapping[str, Any]) -> str:
    if "experts" not in results:
        return ""
    rows = results["experts"]["rows"]
    plain = {row["case"]: row for row in rows if row["contender"] == "plain linear"}
    cells = [
        [
            row["case"],
            row["contender"],
            f"{1e3 * row['seconds']:.3f}",
            f"{row['seconds'] / plain[row['case']]['seconds']:.2f}",
            f"{row['peak_bytes'] / 2**20:.1f}",
        ]
        for row in rows
    ]
    return f"""## Experts

{format_table(["case", "contender", "ms", "times plain", "peak, MB"], cells, markdown=True)}"""


def _training(results: Mapping[str, Any]) -> str:
    cells = []
    for task, result in results.items():
        if task.startswith("train "):
            _, model, which, _ = task.split()
            seconds = statistics.median(result["seconds"])
            row = [model, which, f"{1e3 * seconds:.0f}", f"{1 / seconds:.2f}"]
            cells.append([*row, _gigabytes(result["peak_bytes"]), _gigabytes(result["reserved_bytes"])])
    if not cells:
        return ""
    heading = ["model", "gradient checkpointing", "step, ms", "clips per second", "tensors at most", "reserved"]
    return f"""## Training

One clip of 8 frames and 3 objects, bfloat16, experts trained, SAM 2's prompts with 7 clicks on each of two frames.

{format_table(heading, cells, markdown=True)}"""


def _exactness(results: Mapping[str, Any]) -> str:
    lines = []
    for task, result in results.items():
        if task.startswith("agreement "):
            lines += [
                f"- {contender}: logits of {task.split()[1]} in float32 differ from transformers' by "
                f"{x['to transformers']:.2g} on average, of {x['size of logits']:.2g}; bfloat16 moves them by "
                f"{x['bfloat16']:.2g}."
                for contender, x in result.items()
            ]
        elif task.startswith("gradients "):
            lines.append(
                f"- Gradients with checkpointing, under dropout of {result['dropout']}, differ from those without by "
                f"at most {result['checkpointed']:.2g} of their size, over {result['tensors']} tensors; those of two "
                f"equal runs by {result['same again']:.2g}."
            )
        elif task == "fsdp":
            losses = ", ".join(f"{loss:.4f}" for loss in result["losses"]["FSDP"])
            lines.append(
                f"- Three steps sharded by FSDP through accelerate: losses {losses}; they differ from those of the "
                f"same run without by at most {result['largest difference']:.2g}."
            )
    return "## Exactness\n\n" + "\n".join(lines) if lines else ""


def _not_measured(run: GpuRun) -> str:
    lines = [f"- {name}: no time was left" for name in run.missing]
    lines += [f"- {name}: {text.strip().splitlines()[-1][:300]}" for name, text in run.failures.items()]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.1f} GB"
