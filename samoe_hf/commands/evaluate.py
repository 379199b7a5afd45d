"""Say how good models are on a dataset: a table, results.json, report.md with pictures, and masks.

    samoe evaluate MODEL --dataset davis --root DAVIS --split val --output outputs/davis
    samoe evaluate MODEL --dataset npz --root CT --prompt point:5 --seeds 10 --output outputs/ct
    samoe evaluate --model A --model B --dataset davis --root DAVIS --prompt clicks:3@8 --output outputs/a_b
    samoe evaluate --predictions MASKS --dataset davis --root DAVIS --output outputs/masks
    accelerate launch --num_processes 8 -m samoe_hf evaluate MODEL --dataset sa_v_val --root SA-V --output outputs/sa_v

A prompt is given on the first annotated frame that shows an object: its `mask`, a `box`, a `point` drawn from the mask
or several (`point:N`), or N clicks, each in the middle of the largest error so far (`clicks:N`). `clicks:N@M` goes on
clicking, online, where the IoU falls below 0.75, on up to M frames of each object; `clicks:N@M:offline` does so in M
passes, on the frames of the lowest IoU.

Each video's result is kept when it is finished: the same command again goes on with what is left.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from samoe_hf.data.layouts import MaskFormat, layout_of
from samoe_hf.data.registry import add_dataset_arguments, videos_from_arguments
from samoe_hf.errors import InputError
from samoe_hf.evaluation.evaluate import SURFACE_TOLERANCE
from samoe_hf.evaluation.metrics import Protocol
from samoe_hf.evaluation.report import comparison_table, summary_table, write_evaluation_report
from samoe_hf.evaluation.run import Evaluation, choose_seeds
from samoe_hf.evaluation.simulated_user import PromptStrategy
from samoe_hf.evaluation.statistics import seen_and_unseen, to_json
from samoe_hf.model.weights_io import write_text
from samoe_hf.model.weights_trained import is_original_checkpoint

from .options import (
    add_original_options,
    command_parser,
    original_options,
    start_processes,
    unique_names,
    usable_device,
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("evaluate", __doc__)
    add_model_options(parser.add_argument_group("models"))
    add_dataset_arguments(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", default="mask", help="mask, box, point[:N] or clicks:N[@M[:offline]]")
    prompts.add_argument("--seeds", type=int, default=1, metavar="N", help="of drawn points: 42, 1042, … for N runs")
    scores = parser.add_argument_group("scores")
    scores.add_argument("--protocol", choices=get_args(Protocol), help="which frames count; by default the dataset's")
    scores.add_argument("--surface-tolerance", type=float, default=SURFACE_TOLERANCE, metavar="MM", help="for volumes")
    scores.add_argument(
        "--seen-unseen",
        nargs=2,
        type=Path,
        metavar=("META", "TRAIN_META"),
        help="YouTube-VOS' meta.json of the split and of training",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for results and masks")
    output.add_argument("--layout", choices=get_args(MaskFormat), help="of the masks; by default the dataset's")
    output.add_argument("--overwrite", action="store_true", help="replace the results of another evaluation there")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", type=usable_device, help="such as cuda or cpu; by default the best there is")
    parsed = parser.parse_args(arguments)
    parsed.models = [*([parsed.model] if parsed.model else []), *parsed.models]
    if not parsed.models and not parsed.predictions:
        parser.error("at least one MODEL or --predictions is needed")
    return parsed


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Adds what is scored: models, and masks that were written before."""
    group.add_argument("model", nargs="?", metavar="MODEL", help="a SamoeModel, SAM 2 video, SAM 3, or an original .pt")
    group.add_argument("--model", action="append", default=[], dest="models", metavar="MODEL", help="one more")
    group.add_argument(
        "--predictions", action="append", default=[], type=Path, metavar="DIR", help="score these masks as well"
    )
    add_original_options(group)


def label_sources(sources: Sequence[str | Path]) -> list[str]:
    """A short name for each model, all different."""
    names = []
    for path in map(Path, sources):
        stem = path.stem if path.suffix in (".pt", ".pth") else path.resolve().name if path.exists() else path.name
        names.append(stem or "model")
    return unique_names(names)


def describe_dataset(arguments: argparse.Namespace) -> dict[str, Any]:
    root = arguments.root
    return {
        "kind": arguments.dataset,
        "root": root and str(root.resolve() if root.exists() else root),
        "split": arguments.split,
        "domain": arguments.domain,
        "option": arguments.option,
    }


def read_meta(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"`--seen-unseen` {path} is not JSON: {error}") from error


def build_evaluation(arguments: argparse.Namespace) -> Evaluation:
    prompt = PromptStrategy.parse(arguments.prompt)
    groups = None
    if arguments.seen_unseen:
        groups = seen_and_unseen(*map(read_meta, arguments.seen_unseen))
    return Evaluation(
        videos_from_arguments(arguments),
        describe_dataset(arguments),
        arguments.output,
        prompt,
        choose_seeds(prompt, arguments.seeds),
        arguments.protocol or layout_of(arguments.dataset).protocol,
        arguments.layout or layout_of(arguments.dataset).masks,
        arguments.surface_tolerance,
        groups,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    state = start_processes(parsed.device)
    evaluation = build_evaluation(parsed)
    if parsed.seeds > len(evaluation.seeds) and state.is_main_process:
        print(f"The prompt {evaluation.prompt} draws nothing at random: one run instead of {parsed.seeds}.")

    sources = [*parsed.models, *parsed.predictions]
    has_original = any(map(is_original_checkpoint, parsed.models))
    entries = []
    for source, label in zip(sources, label_sources(sources), strict=True):
        if isinstance(source, Path):
            entries.append(evaluation.run_masks(source, label, state))
        else:
            options = original_options(parsed) if is_original_checkpoint(source) or not has_original else {}
            entries.append(evaluation.run_model(source, label, state, parsed.overwrite, **options))
    if not state.is_main_process:
        return

    results = evaluation.results(entries, state)
    write_text(parsed.output / "results.json", to_json(results))
    report = write_evaluation_report(results, parsed.output)
    print(f"\n{summary_table(results)}")
    for comparison in results["comparisons"]:
        print(f"\n{comparison['model']} less {comparison['baseline']}\n{comparison_table(comparison)}")
    for model in results["models"]:
        if model["speed"]["fps"]:
            print(f"{model['label']}: {model['speed']['fps']:.1f} frames per second")
    print(f"Written: {parsed.output / 'results.json'}, {report}, masks in {parsed.output / 'runs'}")
