"""Fine-tune a model on clips, as a YAML says; keys of the YAML can be set on the command line.

    python scripts/train.py configs/finetune_davis.yaml --learning_rate 2e-4
    accelerate launch scripts/train.py configs/finetune_davis.yaml

Before and after training it tracks the videos of `eval_data`. What was trained and the processor are written to
`output_dir`, which `SamoeModel.from_pretrained` and `AutoProcessor` load.
"""

import sys

from transformers.trainer_utils import get_last_checkpoint

from samoe_hf.conversion import build_processor
from samoe_hf.training import SamoeTrainer, parse_run


def main() -> None:
    model_arguments, data_arguments, recipe, segmentation_loss, training_arguments = parse_run()
    model = model_arguments.load()
    videos = data_arguments.eval_videos()
    trainer = SamoeTrainer(
        model,
        training_arguments,
        build_processor(model.config),
        recipe,
        segmentation_loss,
        train_dataset=data_arguments.train_dataset(model.config.image_size, training_arguments.seed),
        eval_dataset=videos,
    )
    if trainer.is_world_process_zero():
        model.print_trainable_parameters()
    resume = training_arguments.resume_from_checkpoint
    if resume in ("true", "True", "last"):
        resume = get_last_checkpoint(training_arguments.output_dir)
    if videos and resume is None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if videos:
        trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
