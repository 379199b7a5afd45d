"""Say how good models are on a dataset: a table, results.json, report.md with pictures, and masks.

    samoe evaluate MODEL --dataset davis --root DAVIS --split val --output outputs/davis
    samoe evaluate MODEL --dataset npz --root CT --prompt point:5 --seeds 10 --output outputs/ct
    samoe evaluate --model A --model B --dataset davis --root DAVIS --prompt clicks:3@8 --output outputs/a_b
    samoe evaluate --predictions MASKS --dataset davis --root DAVIS --output outputs/masks
    accelerate launch --num_processes 8 -m samoe_hf evaluate MODEL --dataset sa_v_val --root SA-V --output outputs/sa_v

A prompt is given on the first annotated frame that shows an object: its `mask`, a `box`, a `point` drawn from the mask
or several (`point:N`), or N clicks, each in the middle of the largest error so far (`clicks:N`). `clicks:N@M` goes on
clicking, online, where the IoU falls below 0.75, on up to M frames of each object; `clicks:N@M:offline` does so in M
passes, on the frames of the lowest IoU. With `:look` in place of that a user corrects, after a first pass, the M - 1
frames that are most worth a look, and with `:even` as many even ones; also by masks (`mask@M:look`) and boxes.

Each video's result is kept when it is finished: the same command again goes on with what is left.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from samoe_hf.data.layouts import Protocol, layout_of
from samoe_hf.errors import InputError, input_errors

from . import options

if TYPE_CHECKING:
    from accelerate import PartialState

    from samoe_hf.evaluation.run import Evaluation

WAITING_BYTES = 2**30  # of models that are kept from their check until their turn; larger ones are loaded twice


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.command_parser("evaluate", __doc__)
    models = parser.add_argument_group("models")
    help_text = "a SamoeModel, SAM 2 video, SAM 3, EdgeTAM or an original .pt"
    models.add_argument("model", nargs="?", metavar="MODEL", help=help_text)
    models.add_argument("--model", action="append", default=[], dest="models", metavar="MODEL", help="one more")
    help_text = "score these masks as well"
    models.add_argument("--predictions", action="append", default=[], type=Path, metavar="DIR", help=help_text)
    options.add_original_options(models)
    options.add_dataset_options(parser)
    options.add_memory_option(models, several=True)
    options.add_unknown_option(models)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", default="mask", help="mask, box, point[:N] or clicks:N[@M[:offline|look|even]]")
    prompts.add_argument("--seeds", type=int, default=1, metavar="N", help="of drawn points: 42, 1042, … for N runs")
    scores = parser.add_argument_group("scores")
    scores.add_argument("--protocol", choices=get_args(Protocol), help="which frames count; by default the dataset's")
    scores.add_argument("--surface-tolerance", type=float, default=2.0, metavar="MM", help="for volumes")
    help_text, files = "YouTube-VOS' meta.json of the split and of training", ("META", "TRAIN_META")
    scores.add_argument("--seen-unseen", nargs=2, type=Path, metavar=files, help=help_text)
    output = options.add_output_option(parser, "folder for results and masks")
    options.add_layout_option(output)
    output.add_argument("--overwrite", action="store_true", help="replace the results of another evaluation there")
    options.add_videos_option(options.add_tracking_options(parser, shared=True))
    parsed = parser.parse_args(arguments)
    parsed.models = [*([parsed.model] if parsed.model else []), *parsed.models]
    if not parsed.models and not parsed.predictions:
        parser.error("at least one MODEL or --predictions is needed")
    if parsed.predictions and parsed.layout in options.FORMATS:
        parser.error(f"`--predictions` are images, not {parsed.layout}; `samoe data convert --to davis` makes them")
    return parsed


def label_sources(sources: Sequence[str | Path]) -> list[str]:
    """A short name for each model, all different."""
    names = []
    for path in map(Path, sources):
        stem = path.stem if path.suffix in (".pt", ".pth") else path.resolve().name if path.exists() else path.name
        names.append(stem or "model")
    return options.unique_names(names)


def build_evaluation(parsed: argparse.Namespace) -> Evaluation:
    from samoe_hf.evaluation.run import Evaluation, choose_seeds
    from samoe_hf.evaluation.simulated_user import PromptStrategy
    from samoe_hf.evaluation.statistics import seen_and_unseen

    prompt = PromptStrategy.parse(parsed.prompt)
    with input_errors():
        groups = seen_and_unseen(*parsed.seen_unseen) if parsed.seen_unseen else None
    dataset = options.open_dataset(parsed)
    return Evaluation(
        dataset.videos(),
        dataset.describe(parsed),
        parsed.output,
        prompt,
        choose_seeds(prompt, parsed.seeds),
        parsed.protocol or layout_of(dataset.kind).protocol,
        options.mask_format(parsed.layout, dataset.kind),
        parsed.surface_tolerance,
        groups,
    )


def run(parsed: argparse.Namespace) -> None:
    from samoe_hf.one_writer import OneWriter

    state, _ = options.start_processes(parsed.device)
    evaluation = build_evaluation(parsed)
    for name in () if (parsed.output / "runs").is_dir() else ("results.json", "report.md"):
        if (parsed.output / name).exists():
            raise InputError(f"`--output` {parsed.output} has a {name} that no evaluation wrote; give another folder.")
    with OneWriter(parsed.output):
        evaluate(parsed, evaluation, state)


def evaluate(parsed: argparse.Namespace, evaluation: Evaluation, state: PartialState) -> None:
    """Evaluates the models and masks, and writes and prints the results."""
    from samoe_hf.evaluation import report
    from samoe_hf.evaluation.statistics import to_json
    from samoe_hf.model.weights_trained import is_original_checkpoint
    from samoe_hf.whole_files import write_text

    if parsed.seeds > len(evaluation.seeds) and state.is_main_process:
        print(f"The prompt {evaluation.prompt} draws nothing at random: one run instead of {parsed.seeds}.")

    of_original = {"experts": parsed.experts, "original_config": parsed.config}
    has_original = any(map(is_original_checkpoint, parsed.models))
    sources, several = [*parsed.models, *parsed.predictions], list(dict.fromkeys(parsed.memory_selection or [None]))
    runs = []
    for source, label in zip(sources, label_sources(sources), strict=True):
        for selection in [None] if isinstance(source, Path) else several:
            runs.append((source, selection, f"{label}-{selection}" if selection and len(several) > 1 else label))
    labels = options.unique_names(label for *_, label in runs)
    for_tool = {label: options.format_folder(parsed.layout, parsed.output / "runs" / label) for label in labels}
    masks, models = {}, {}
    for (source, selection, _), label in zip(runs, labels, strict=True):
        if isinstance(source, Path):
            masks[label] = source
        else:
            own = of_original if is_original_checkpoint(source) or not has_original else {}
            own = {**own, **options.tracking_options(parsed, selection)}
            models[label] = partial(evaluation.load_model, source, label, state, parsed.overwrite, **own)
    # What is wrong with a model or with masks is found before minutes of tracking, and before results are removed.
    waiting, size = {}, 0
    for label, load in models.items():
        loaded = load()
        size += loaded[0].get_memory_footprint()
        if size <= WAITING_BYTES or not waiting:
            waiting[label] = loaded
        del loaded
    if parsed.overwrite and state.is_main_process:
        (parsed.output / "results.json").unlink(missing_ok=True)
    entries = {}
    for label, source in masks.items():
        with input_errors():  # these masks are the data
            entries[label] = evaluation.run_masks(source, label, state, parsed.overwrite)
    for label, load in models.items():
        entries[label] = evaluation.run_model(
            waiting.pop(label, None) or load(), state, parsed.overwrite, parsed.videos_at_once
        )
    if not state.is_main_process:
        return
    results = evaluation.results([entries[label] for label in labels], state)
    write_text(parsed.output / "results.json", to_json(results))
    written = report.write_evaluation_report(results, parsed.output)
    print(f"\n{report.summary_table(results)}")
    if left_out := report.describe_left_out(results["models"][0]):
        print(left_out)
    for comparison in results["comparisons"]:
        about = f"{report.comparison_table(comparison)}\n{report.describe_interval(comparison)}"
        print(f"\n{comparison['model']} less {comparison['baseline']}\n{about}")
    for model in results["models"]:
        if any("experts_of" in video for video in model["videos"]):
            videos = {f"{video['domain']}/{video['video']}": video for video in model["videos"]}
            print(f"\n{model['label']}:\n{report.describe_choices(videos)}")
        if model["speed"]["fps"]:
            print(f"{model['label']}: {model['speed']['fps']:.1f} frames per second")
    for label, folder in for_tool.items():
        if folder is not None:
            options.write_for_tool(parsed.layout, evaluation.predicted(label), folder, parsed.overwrite)
    print(f"Written: {parsed.output / 'results.json'}, {written}, masks in {parsed.output / 'runs'}")
