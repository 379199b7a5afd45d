"""Fine-tune a model on clips, as a YAML says; keys of the YAML can be set on the command line.

    python scripts/train.py configs/finetune_davis.yaml --learning_rate 2e-4
    accelerate launch scripts/train.py configs/finetune_davis.yaml

Before and after training it tracks the videos of `eval_data`. What was trained and the processor are written to
`output_dir`, which `SamoeModel.from_pretrained` and `AutoProcessor` load.
"""

import sys

from transformers.trainer_utils import get_last_checkpoint

from samoe_hf.training.trainer import build_trainer


def main() -> None:
    trainer = build_trainer()
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    resume = trainer.args.resume_from_checkpoint
    if resume == "last":
        resume = get_last_checkpoint(trainer.args.output_dir)
    if trainer.eval_dataset and resume is None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.eval_dataset:
        trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
