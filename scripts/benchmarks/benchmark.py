"""Time and memory beside others who do the same work, in one run.

    python scripts/benchmarks/benchmark.py experts --model model_tiny
    python scripts/benchmarks/benchmark.py track --model model_micro --objects 1 4 16
    python scripts/benchmarks/benchmark.py track --model model_base_plus --peers sam2 "sam2 compiled" --dtype bfloat16
    python scripts/benchmarks/benchmark.py parts --model model_tiny --objects 1
    python scripts/benchmarks/benchmark.py long --model model_micro --frames 10000
    python scripts/benchmarks/benchmark.py train --model model_tiny --frames 8 --objects 3
    python scripts/benchmarks/benchmark.py memory --model model_tiny --frames 8 --objects 3
    python scripts/benchmarks/benchmark.py gpu --output DIR

The contenders have the same weights and take turns; before they are timed, their outputs are compared. A Markdown
table, a plot and all times are written to `--output`. Peers need the `bench` extra.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import experts
import gpu
import memory
import parts
import tracking
import training
from gpu_report import write_gpu_report
from measure import Measurement, describe_machine, to_markdown, write_results
from meta_order import PEERS
from samoe_hf.commands.options import add_device_option
from samoe_hf.data.registry import load_videos, read_yaml
from samoe_hf.errors import InputError
from samoe_hf.evaluation.report import format_table
from samoe_hf.model.configuration_samoe import SamoeConfig


def common_options() -> argparse.ArgumentParser:
    """The options that all kinds of benchmarks have."""
    common = argparse.ArgumentParser(add_help=False)
    model = common.add_argument_group("model")
    model.add_argument(
        "--model",
        nargs="+",
        default=["model_micro"],
        metavar="MODEL.yaml",
        help="a file, or one of the package's sizes: model_tiny, model_base_plus, ... (model_micro)",
    )
    output = common.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("outputs/benchmark"), metavar="DIR", help="(%(default)s)")
    machine = add_device_option(common)
    machine.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    machine.add_argument("--threads", type=int, help="PyTorch's threads on a CPU")
    machine.add_argument("--repeats", type=int, default=5, help="how often each is timed (%(default)s)")
    return common


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    title, of_kind = "kinds of benchmarks", "`benchmark.py KIND --help` shows the options of one."
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", title=title, description=of_kind)

    def add(kind: str, description: str) -> argparse._ArgumentGroup:
        one = kinds.add_parser(kind, parents=[common_options()], help=description, description=description)
        return one.add_argument_group("work")

    work = add("experts", "a layer, and the whole memory attention")
    work.add_argument("--tokens", type=int, default=4096, help="(%(default)s)")
    work.add_argument("--width", type=int, default=256, help="of the layer (%(default)s)")
    work.add_argument("--num-experts", type=int, default=10, help="(%(default)s)")
    work = add("track", "time per frame for more and more objects")
    work.add_argument("--objects", type=int, nargs="+", default=[1, 4, 16], help="(%(default)s)")
    work.add_argument("--frames", type=int, default=17, help="(%(default)s)")
    work.add_argument("--peers", nargs="*", default=["transformers", "sam2"], choices=tracking.PEERS)
    work.add_argument("--compile", action="store_true", help="also our model, compiled")
    work.add_argument(
        "--pooling",
        type=int,
        nargs=2,
        metavar=("RECENT", "OLDER"),
        help="also our model with memories averaged over squares of so many tokens a side",
    )
    work = add("parts", "parts of a frame's work beside the least they could take")
    work.add_argument("--objects", type=int, default=1, help="(%(default)s)")
    work = add("long", "memory and time per frame through a long video")
    work.add_argument("--objects", type=int, default=1, help="(%(default)s)")
    work.add_argument("--frames", type=int, default=10000, help="(%(default)s)")
    work = add("train", "a training step, its parts, and whether data keep up")
    work.add_argument("--frames", type=int, default=8, help="of a clip (%(default)s)")
    work.add_argument("--objects", type=int, default=3, help="of a clip (%(default)s)")
    work.add_argument(
        "--peers", nargs="*", default=["transformers"], choices=list(PEERS), help="whose modules do it in Meta's order"
    )
    work.add_argument("--workers", type=int, default=2, help="of the data loader (%(default)s)")
    work.add_argument("--steps", type=int, default=20, help="steps with the data loader (%(default)s)")
    work.add_argument("--davis", type=Path, help="draw its clips from this DAVIS folder, not from synthetic videos")
    work.add_argument("--gradient-checkpointing", action="store_true", help="run frames again in the backward pass")
    work.add_argument("--encoder-batch-size", type=int, help="frames encoded at once; all by default")
    work = add("memory", "what a frame of tracking and a training step hold, predicted and measured")
    work.add_argument("--frames", type=int, default=8, help="of a training clip (%(default)s)")
    work.add_argument("--objects", type=int, default=3, help="(%(default)s)")
    _add_gpu(kinds)
    parsed = parser.parse_args(arguments)
    _check_counts(kinds.choices[parsed.kind], parsed)
    return parsed


def _check_counts(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Ends the command if less than the least is asked for."""
    least = dict.fromkeys(("objects", "repeats", "threads", "tokens", "width", "num_experts", "steps", "pooling"), 1)
    # Memories are first read on the second frame; tracking is timed when the memory is full.
    least["frames"] = {"train": 2, "memory": 2, "track": tracking.FIRST_TIMED_FRAME + 1}.get(parsed.kind, 1)
    least |= {"workers": 0, "encoder_batch_size": 1}
    for name, smallest in least.items():
        given = getattr(parsed, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < smallest:
                parser.error(f"--{name.replace('_', '-')} must be at least {smallest}, got {value}")


def _add_gpu(kinds: argparse._SubParsersAction) -> None:
    description = (
        "every figure of a GPU: tracking beside others, parts and their floors, experts, training, memory, exactness. "
        "What a folder has already is not measured again"
    )
    one = kinds.add_parser("gpu", help="every figure of a GPU, in one run", description=description)
    output = Path("outputs/benchmark_gpu")
    one.add_argument("--output", type=Path, default=output, metavar="DIR", help="(%(default)s)")
    one.add_argument("--minutes", type=float, default=9.0, help="how long to go on (%(default)s)")
    one.add_argument(
        "--dry-run", action="store_true", help="the same with tiny sizes on any device, to see that it runs"
    )
    add_device_option(one)


def run_experts(arguments: argparse.Namespace, config: SamoeConfig, dtype: torch.dtype) -> None:
    shape = {"tokens": arguments.tokens, "width": arguments.width, "num_experts": arguments.num_experts}
    measurements = experts.benchmark_layer(arguments.repeats, arguments.device, dtype, **shape)
    measurements += experts.benchmark_memory_attention(config, arguments.repeats, arguments.device, dtype)
    title = f"Experts: {arguments.tokens} tokens, {arguments.width} wide, {arguments.num_experts} experts"
    report(arguments, "experts", title, measurements, to_markdown(measurements, "plain linear"))


def run_tracking(arguments: argparse.Namespace, configs: dict[str, SamoeConfig], dtype: torch.dtype) -> None:
    contenders = ["samoe_hf", *(["samoe_hf compiled"] if arguments.compile else []), *arguments.peers]
    if arguments.pooling:
        contenders.append(f"{tracking.POOLED} {arguments.pooling[0]} {arguments.pooling[1]}")
    measurements = []
    for name, config in configs.items():
        measurements += tracking.benchmark_tracking(
            config,
            name,
            contenders,
            arguments.objects,
            arguments.frames,
            arguments.repeats,
            arguments.device,
            dtype,
        )
    title = f"Tracking: time per frame, {arguments.dtype}"
    report(arguments, "track", title, measurements, to_markdown(measurements, "samoe_hf", "frame"))


def run_parts(arguments: argparse.Namespace, config: SamoeConfig, dtype: torch.dtype) -> None:
    settings = (config, arguments.objects, arguments.repeats, arguments.device, dtype)
    measured, attention = parts.benchmark_parts(*settings), parts.benchmark_attention(*settings)
    peaks = parts.Peaks.of(arguments.device, dtype)
    tables = format_table(parts.HEADER, [part.row(peaks) for part in measured], markdown=True)
    tables += (
        f"\n\nAt peaks of {peaks.flops / 1e9:.0f} GFLOP/s (a product) and {peaks.bandwidth / 1e9:.1f} GB/s (a copy)."
    )
    tables += f"\n\n{to_markdown(attention, 'as chosen')}"
    bars = []
    for part in measured:
        case = part.measurement.case
        seconds = [s / part.frames for s in part.measurement.seconds]
        floors = zip(("floor of arithmetic", "floor of data"), part.floors(peaks), strict=True)
        bars += [Measurement(case, "measured", seconds), *(Measurement(case, name, [s]) for name, s in floors)]
    count = f"{arguments.objects} object{'s' if arguments.objects > 1 else ''}"
    report(arguments, "parts", f"One frame, its memory full: {count}, {arguments.dtype}", bars, tables)


def run_long(arguments: argparse.Namespace, config: SamoeConfig) -> None:
    rows = tracking.benchmark_long_video(config, arguments.objects, arguments.frames, arguments.device)
    lines = ["| frames tracked | median per frame, ms | memory held, MB |", "| --- | --- | --- |"]
    lines += [f"| {done} | {1e3 * seconds:.2f} | {held / 2**20:.1f} |" for done, seconds, held in rows]
    arguments.output.mkdir(parents=True, exist_ok=True)
    tracking.plot_long_video(rows, arguments.output / "long.png", arguments.device)
    text = "\n".join([describe_machine(arguments.device), "", *lines])
    (arguments.output / "long.md").write_text(f"# One long video\n\n{text}\n")
    print(f"{text}\n\nWritten: long.md and long.png in {arguments.output}")


def run_training(arguments: argparse.Namespace, config: SamoeConfig, dtype: torch.dtype) -> None:
    measurements = training.benchmark_training(
        config,
        arguments.frames,
        arguments.objects,
        arguments.repeats,
        arguments.device,
        dtype,
        arguments.gradient_checkpointing,
        arguments.encoder_batch_size,
    )
    encoder, forward, both = (m.median for m in measurements[2:])
    step = measurements[0].median
    videos = None if arguments.davis is None else load_videos("davis", arguments.davis)
    waiting, computing = training.measure_waiting(
        config, videos, arguments.frames, arguments.objects, arguments.workers, arguments.steps, arguments.device, dtype
    )
    parts = {
        "encoder": encoder,
        "tracking and loss": forward - encoder,
        "backward": both - forward,
        "optimizer": step - both,
        f"waiting for {arguments.workers} workers": waiting.median,
    }
    table = "\n".join(["| part of a step | median, ms |", "| --- | --- |"])
    table += "".join(f"\n| {name} | {1e3 * max(seconds, 0):.2f} |" for name, seconds in parts.items())
    table += f"\n\nBeside the data loader a step computes for {1e3 * computing.median:.2f} ms."
    title = f"Training: one clip of {arguments.frames} frames, {arguments.objects} objects, {arguments.dtype}"
    shape = (arguments.frames, arguments.objects, arguments.repeats, arguments.device)
    beside = training.benchmark_order(config, arguments.peers, *shape) if arguments.peers else []
    tables = f"{to_markdown(measurements[:2], 'samoe_hf', 'clip')}\n\n{table}"
    if beside:
        tables += f"\n\nForward and backward in float32, no dropout:\n\n{to_markdown(beside, 'samoe_hf', 'clip')}"
    report(arguments, "train", title, measurements[:2] + beside, tables)


def run_memory(arguments: argparse.Namespace, config: SamoeConfig, dtype: torch.dtype) -> None:
    settings = (arguments.objects, arguments.device, dtype)
    tables = {
        f"Tracking {arguments.objects} objects": memory.tracking_memory(config, *settings),
        f"Training on a clip of {arguments.frames} frames": memory.training_memory(config, arguments.frames, *settings),
    }
    machine = describe_machine(arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    memory.plot_memory(tables, arguments.output / "memory.png", machine)
    text = "\n\n".join(f"## {title}\n\n{memory.memory_table(rows)}" for title, rows in tables.items())
    (arguments.output / "memory.md").write_text(f"# Memory, {arguments.dtype}\n\n{machine}\n\n{text}\n")
    print(f"{machine}\n\n{text}\n\nWritten: memory.md and memory.png in {arguments.output}")


def report(arguments: argparse.Namespace, name: str, title: str, measurements: list, tables: str) -> None:
    write_results(arguments.output, name, title, measurements, tables, arguments.device)
    print(f"{title}\n{describe_machine(arguments.device)}\n\n{tables}\n")
    print(f"Written: {name}.md, {name}.json and {name}.png in {arguments.output}")


def run_gpu(arguments: argparse.Namespace) -> None:
    run = gpu.benchmark_gpu(arguments.device, arguments.output, arguments.minutes, arguments.dry_run)
    path = write_gpu_report(run, arguments.output)
    print(f"{path.read_text()}\nWritten: {len(run.results)} results and {path}")
    if run.missing:
        print(f"No time was left for {len(run.missing)} of the tasks. Run it again to go on.")
    if run.failures:
        for name, text in run.failures.items():
            print(f"\n{name}:\n{text}", file=sys.stderr)
        raise InputError(f"{len(run.failures)} of the tasks failed: {', '.join(run.failures)}.")


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    if parsed.kind == "gpu":
        run_gpu(parsed)
        return
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    dtype = getattr(torch, parsed.dtype)
    configs = {Path(path).stem.removeprefix("model_"): SamoeConfig(**read_yaml(path)) for path in parsed.model}
    first = next(iter(configs.values()))
    if parsed.kind == "experts":
        run_experts(parsed, first, dtype)
    elif parsed.kind == "track":
        run_tracking(parsed, configs, dtype)
    elif parsed.kind == "parts":
        run_parts(parsed, first, dtype)
    elif parsed.kind == "long":
        run_long(parsed, first)
    elif parsed.kind == "memory":
        run_memory(parsed, first, dtype)
    else:
        run_training(parsed, first, dtype)


if __name__ == "__main__":
    main()
