"""Fine-tune a model on clips, as a YAML says; keys of the YAML can be set on the command line.

    samoe train finetune_davis --learning_rate 2e-4
    samoe train my_run.yaml
    accelerate launch -m samoe_hf train my_run.yaml

A run is a YAML file, or the name of one that comes with the package, such as smoke, which needs no data. Before and
after training it tracks the videos of `eval_data`. What was trained and the processor are written to `output_dir`,
which `SamoeModel.from_pretrained` and `AutoProcessor` load.

Keys are those below, and all of transformers' TrainingArguments, such as --max_steps.
"""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields

from samoe_hf.data.configs import shipped_configs
from samoe_hf.errors import InputError, input_errors
from samoe_hf.model.recipes import LossSettings, PromptSettings
from samoe_hf.training.keys import DataKeys, ModelKeys, TrainingKeys

from .options import command_parser

KINDS = (ModelKeys, DataKeys, PromptSettings, LossSettings, TrainingKeys)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The words of a run, in `run`; they are parsed with the run's YAML."""
    if "--help-all" in arguments:
        from samoe_hf.training.arguments import run_parser

        run_parser(description=__doc__, formatter_class=HelpFormatter).print_help()
        raise SystemExit(0)
    if {"-h", "--help"} & set(arguments):
        help_parser().print_help()
        raise SystemExit(0)
    words = [word for word in arguments if word != "--traceback"]
    if not words:
        names = ", ".join(name for name in shipped_configs() if not name.startswith("model_"))
        raise InputError(f"A run is missing: a YAML file, or one of {names}; `samoe train --help` explains it.")
    return argparse.Namespace(run=words)


def help_parser() -> argparse.ArgumentParser:
    """A parser for the help text, with this package's keys of a run as options, in groups."""
    parser = command_parser("train", __doc__)
    parser.usage, parser.formatter_class = "samoe train RUN.yaml|NAME [--KEY VALUE ...]", HelpFormatter
    help_text = "show the keys of transformers' TrainingArguments as well"
    parser.add_argument("--help-all", action="store_true", default=argparse.SUPPRESS, help=help_text)
    for kind in KINDS:
        group = parser.add_argument_group(kind._argument_group_name)
        for key in fields(kind):
            default = key.default if key.default_factory is MISSING else key.default_factory()
            group.add_argument(
                f"--{key.name}",
                default=default if default not in (None, []) else argparse.SUPPRESS,
                metavar=key.metadata.get("metavar", key.name.upper()),
                help=key.metadata.get("help", " "),
            )
    return parser


def run(parsed: argparse.Namespace) -> None:
    from samoe_hf.training.checkpoints import check_output_dir
    from samoe_hf.training.trainer import build_trainer

    trainer = build_trainer(parsed.run)
    if trainer.is_world_process_zero():
        print(trainer.model.summary())
    with trainer.writer:
        check_output_dir(trainer.args, None)  # another process may have written there meanwhile
        resume = trainer.args.resume_from_checkpoint
        if trainer.eval_dataset and resume is None:
            metrics, wanted = trainer.evaluate(), trainer.args.metric_for_best_model
            names = [name.removeprefix("eval_") for name in metrics]
            if wanted is not None and wanted.removeprefix("eval_") not in names:
                raise InputError(f"`metric_for_best_model` must be one of {', '.join(names)}, got {wanted!r}.")
            trainer.log_metrics("eval", metrics)
        trainer.train(resume_from_checkpoint=resume)
        with input_errors():
            trainer.save_model()
        if trainer.eval_dataset:
            trainer.log_metrics("eval", trainer.evaluate())
    if trainer.is_world_process_zero():
        print(f"Written: the model and its processor in {trainer.args.output_dir}")
