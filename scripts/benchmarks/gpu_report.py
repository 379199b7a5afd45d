"""The report of all figures of a GPU: tables in Markdown, and pictures."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gpu import GpuRun
from measure import COLORS
from samoe_hf.evaluation.report import format_table
from samoe_hf.model.weights_io import whole_file, write_text

# Frames per second of one object: `facebookresearch/sam2`, README, on an A100, with a compiled image encoder.
PUBLISHED_SAM2 = {"tiny": 91.2, "small": 84.8, "base_plus": 64.1, "large": 39.5}
# Number of objects -> frames per second on an H100: SAM 3.1, as published.
PUBLISHED_SAM31 = {1: 33.8, 16: 30.2, 128: 11.5}


def write_gpu_report(run: GpuRun, folder: Path) -> Path:
    """Writes `report.md` and its pictures; returns the report's path."""
    sections = [
        _tracking(run.results, folder),
        _parts(run.results),
        _experts(run.results),
        _training(run.results),
        _exactness(run.results),
        _long(run.results),
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
    sam2 = ", ".join(f"{name} {fps}" for name, fps in PUBLISHED_SAM2.items())
    sam31 = ", ".join(f"{fps} for {n}" for n, fps in PUBLISHED_SAM31.items())
    published = f"SAM 2.1 on an A100, one object: {sam2}. SAM 3.1 on an H100, by objects: {sam31}"
    _plot_tracking(found, folder / "tracking.png")
    memory = [
        [model, *(_gigabytes(peaks.get((model, n))) for n in counts)]
        for model in found
        if any(peaks.get((model, n)) for n in counts)
    ]
    text = f"""## Tracking: frames per second

At 1024 x 1024 by autocast to bfloat16, memory full, experts included in ours. Masks are resized to the frame's size.

{format_table(heading, rows, markdown=True)}

![Frames per second by number of objects](tracking.png)

Published elsewhere, not measured here: {published}."""
    if memory:
        heading = ["model", *heading[2:]]
        text += (
            f"\n\nThe most memory of ours beyond the weights and the frames:\n\n{format_table(heading, memory, True)}"
        )
    return text


def _plot_tracking(found: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path) -> None:
    figure = Figure(figsize=(4.2 * len(found), 4), layout="constrained")
    names = list(dict.fromkeys(contender for by in found.values() for contender in by))
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (model, by) in zip(panels, found.items(), strict=True):
        for contender, fps in by.items():
            style = "-" if contender.startswith("samoe") else "--"
            counts = sorted(fps)
            color = COLORS[names.index(contender) % len(COLORS)]
            axes.plot(counts, [fps[n] for n in counts], style, marker="o", ms=4, color=color, label=contender)
        if model in PUBLISHED_SAM2:
            axes.plot([1], [PUBLISHED_SAM2[model]], "k*", ms=9, label="SAM 2.1 on an A100, published")
        axes.plot(*zip(*PUBLISHED_SAM31.items(), strict=True), "k:", marker="x", label="SAM 3.1, published")
        axes.set_xscale("log", base=2)
        counts = sorted({n for fps in by.values() for n in fps} | set(PUBLISHED_SAM31))
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


def _parts(results: Mapping[str, Any]) -> str:
    peaks = results.get("peaks")
    measured = {task.split()[1]: result for task, result in results.items() if task.startswith("parts ")}
    if not (measured and peaks):
        return ""
    rows, kernels = [], []
    for model, result in measured.items():
        for part in result["parts"]:
            arithmetic, data = part["flops"] / peaks["flops"], part["bytes"] / peaks["bandwidth"]
            floor = max(arithmetic, data)
            row = [model, part["part"], *(f"{1e3 * x:.3f}" for x in (part["seconds"], arithmetic, data))]
            rows.append([*row, f"{part['seconds'] / floor:.1f}", ", ".join(part["kernels"])])
        taken = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in result["attention"].items())
        kernels.append(f"- {model}: {taken}")
    heading = ["model", "part", "ms", "floor of arithmetic, ms", "floor of data, ms", "times floor", "attention"]
    reached = f"{peaks['flops'] / 1e12:.3g} TFLOP/s (a large product) and {peaks['bandwidth'] / 1e12:.3g} TB/s (a copy)"
    return f"""## Parts of a frame beside the least they could take

One object, memory full. The device reaches {reached}.

{format_table(heading, rows, markdown=True)}

Cross attention to a full memory, by kernel:

{chr(10).join(kernels)}"""


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


def _long(results: Mapping[str, Any]) -> str:
    rows = next((x["rows"] for task, x in results.items() if task.startswith("long ")), None)
    if not rows:
        return ""
    chosen = [rows[0], rows[len(rows) // 2], rows[-1]]
    cells = [[f"{done}", f"{1e3 * seconds:.1f}", f"{held / 2**20:.1f}"] for done, seconds, held in chosen]
    return f"""## One long video

{format_table(["frames tracked", "median per frame, ms", "memory held, MB"], cells, markdown=True)}"""


def _not_measured(run: GpuRun) -> str:
    lines = [f"- {name}: no time was left" for name in run.missing]
    lines += [f"- {name}: {_last_line(text)}" for name, text in run.failures.items()]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:300]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.1f} GB"
