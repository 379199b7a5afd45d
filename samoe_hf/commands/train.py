"""Fine-tune a model on clips, as a YAML says; keys of the YAML can be set on the command line.

    samoe train configs/finetune_davis.yaml --learning_rate 2e-4
    accelerate launch scripts/train.py configs/finetune_davis.yaml

Before and after training it tracks the videos of `eval_data`. What was trained and the processor are written to
`output_dir`, which `SamoeModel.from_pretrained` and `AutoProcessor` load.
"""

import argparse
import sys
from collections.abc import Sequence

from samoe_hf.training.arguments import run_parser
from samoe_hf.training.trainer import build_trainer


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is."""


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        raise ValueError("The YAML of a run is missing; `--help` explains it.")
    if arguments[0] in ("-h", "--help"):
        usage = "samoe train RUN.yaml [--KEY VALUE ...]"
        run_parser(prog="samoe train", usage=usage, description=__doc__, formatter_class=HelpFormatter).print_help()
        return
    trainer = build_trainer(arguments)
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    resume = trainer.args.resume_from_checkpoint
    if trainer.eval_dataset and resume is None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.eval_dataset:
        trainer.log_metrics("eval", trainer.evaluate())
