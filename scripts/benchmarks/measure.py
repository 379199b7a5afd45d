"""Times contenders in turns, and writes what they took as a Markdown table and a plot."""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile

import samoe_hf
from samoe_hf.commands.options import add_device_option
from samoe_hf.data.registry import read_yaml
from samoe_hf.evaluation.report import format_table
from samoe_hf.model.configuration_samoe import SamoeConfig

# Okabe and Ito's colours, which are told apart by everyone.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
PACKAGES = ("torch", "transformers", "sam2")


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that all these programs have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_micro", help="a YAML, or one of the package's sizes (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=at_least(1), help="PyTorch's threads on a CPU")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="how often each is timed (%(default)s)")
    add_device_option(parser)
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """A type of `argparse`: whole numbers from a least one on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return number


def prepare(parsed: argparse.Namespace) -> tuple[SamoeConfig, torch.dtype]:
    """Sets the number of threads; returns the configuration and the type of numbers that were asked for."""
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    return SamoeConfig(**read_yaml(parsed.model)), getattr(torch, parsed.dtype)


@dataclass
class Measurement:
    """What a contender took for a case.

    `seconds`: of each repetition. `peak_bytes`: the most device memory that it held at once beyond what was there
    before.
    """

    case: str
    contender: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """As users run a model in `dtype`: float32 as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def without_dropout(model: nn.Module) -> nn.Module:
    """The model, in which nothing is dropped any more, so that it computes what others compute."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_p"):
            module.dropout_p = 0.0
    return model


def measure(
    case: str, contenders: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, memory: bool = False
) -> list[Measurement]:
    """Times each contender `repeats` times after one untimed run.

    They take turns, so that whatever else the machine does falls on all of them.

    Args:
        memory: whether to find the most device memory too, in a run of its own.
    """
    measurements = [Measurement(case, name) for name in contenders]
    for run in contenders.values():
        run()
    for _ in range(repeats):
        for measurement, run in zip(measurements, contenders.values(), strict=True):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            measurement.seconds.append(time.perf_counter() - start)
    if memory:
        for measurement, run in zip(measurements, contenders.values(), strict=True):
            measurement.peak_bytes = peak_bytes(run, device)
    return measurements


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors that a run holds at once, beyond those that were there before."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = sorted(memory_changes(trace_events(profiler)))
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def trace_events(profiler: profile) -> list[dict[str, Any]]:
    """The events of a profiler, as Chrome's format describes them."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        return json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


def memory_changes(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
    """When how many bytes were allocated, or freed, in any order."""
    return [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]


def describe_machine(device: torch.device) -> str:
    """The device, its threads and the versions of what is measured, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    versions = [f"samoe_hf {samoe_hf.__version__}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"without {package}")
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {', '.join(versions)}"


def to_markdown(measurements: Sequence[Measurement], reference: str, per_second: str | None = None) -> str:
    """A table with a row for each measurement.

    Args:
        reference: the contender that the others' ratios are to, in the same case.
        per_second: what there is one of in each repetition, to tell how many a second has.
    """
    references = {m.case: m for m in measurements if m.contender == reference}
    rows = [["case", "contender", "median, ms", "range, ms", f"times {reference}"]]
    rows[0] += [f"{per_second}s/s"] if per_second else []
    has_memory = any(m.peak_bytes is not None for m in measurements)
    rows[0] += ["peak, MB", f"times {reference}'s"] if has_memory else []
    for m in measurements:
        of = references.get(m.case)
        row = [m.case, m.contender, f"{1e3 * m.median:.2f}"]
        row.append(f"{1e3 * min(m.seconds):.2f} to {1e3 * max(m.seconds):.2f}")
        row.append(f"{m.median / of.median:.2f}" if of else "")
        row += [f"{1 / m.median:.2f}"] if per_second else []
        if has_memory:
            row.append("" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.1f}")
            is_there = of is not None and of.peak_bytes and m.peak_bytes is not None
            row.append(f"{m.peak_bytes / of.peak_bytes:.2f}" if is_there else "")
        rows.append(row)
    return format_table(rows[0], rows[1:], markdown=True)


def plot(measurements: Sequence[Measurement], path: Path, title: str, machine: str) -> None:
    """Draws the medians as bars with their range, the contenders of each case beside each other."""
    cases = list(dict.fromkeys(m.case for m in measurements))
    names = list(dict.fromkeys(m.contender for m in measurements))
    figure = Figure(figsize=(max(6.5, 1.8 * len(cases) + 2), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for column, name in enumerate(names):
        found = [(cases.index(m.case), m) for m in measurements if m.contender == name]
        x = [case + (column - (len(names) - 1) / 2) * width for case, _ in found]
        medians = [1e3 * m.median for _, m in found]
        low = [1e3 * (m.median - min(m.seconds)) for _, m in found]
        high = [1e3 * (max(m.seconds) - m.median) for _, m in found]
        bars = axes.bar(x, medians, width, yerr=[low, high], capsize=2, color=COLORS[column], label=name)
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    axes.set_xticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylabel("median and range, ms (log scale)")
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.legend(fontsize=8)
    axes.set_title(f"{title}\n", fontsize=11)
    axes.text(0.5, 1.01, machine, transform=axes.transAxes, ha="center", fontsize=7)
    figure.savefig(path, dpi=150)


def write_results(
    folder: Path, name: str, title: str, measurements: Sequence[Measurement], tables: str, device: torch.device
) -> None:
    """Prints the tables, and writes `name`.md, .json and .png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(device)
    (folder / f"{name}.md").write_text(
        f"# {title}\n\n{machine}\n\n{tables}\n\n![{title}]({name}.png)\n", encoding="utf-8"
    )
    document = {"machine": machine, "measurements": [asdict(m) for m in measurements]}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    plot(measurements, folder / f"{name}.png", title, machine)
    print(f"{title}\n{machine}\n\n{tables}\n\nWritten: {name}.md, .json and .png in {folder}")
