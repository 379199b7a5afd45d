"""Fine-tune a model on clips, as a YAML says; keys of the YAML can be set on the command line.

    samoe train finetune_davis --learning_rate 2e-4
    samoe train my_run.yaml
    accelerate launch -m samoe_hf train my_run.yaml

A run is a YAML file, or the name of one that comes with the package, such as smoke, which needs no data. Before and
after training it tracks the videos of `eval_data`. What was trained and the processor are written to `output_dir`,
which `SamoeModel.from_pretrained` and `AutoProcessor` load.
"""

import argparse
import sys
from collections.abc import Sequence

from samoe_hf.data.configs import shipped_configs
from samoe_hf.errors import InputError
from samoe_hf.training.arguments import run_parser
from samoe_hf.training.trainer import build_trainer


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is."""


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        names = ", ".join(name for name in shipped_configs() if not name.startswith("model_"))
        raise InputError(f"A run is missing: a YAML file, or one of {names}; `samoe train --help` explains it.")
    if {"-h", "--help"} & set(arguments):
        run_parser(description=__doc__, formatter_class=HelpFormatter).print_help()
        return
    trainer = build_trainer(arguments)
    if trainer.is_world_process_zero():
        print(trainer.model.summary())
    resume = trainer.args.resume_from_checkpoint
    if trainer.eval_dataset and resume is None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.eval_dataset:
        trainer.log_metrics("eval", trainer.evaluate())
    if trainer.is_world_process_zero():
        print(f"Written: the model and its processor in {trainer.args.output_dir}")
