"""Fine-tune a model on clips, as a YAML says; keys of the YAML can be set on the command line.

    python scripts/train.py configs/finetune_davis.yaml --learning_rate 2e-4

Before and after training it tracks the videos of `eval_data` and prints their mean IoU; the model and its processor are
written to `output_dir`.
"""

import sys

from transformers import Trainer

from samoe_hf.conversion import build_processor
from samoe_hf.evaluation import evaluate_videos, mean_iou
from samoe_hf.training import PromptedCollator, parse_run


def main() -> None:
    model_arguments, data_arguments, training_arguments = parse_run()
    model = model_arguments.load()
    model.print_trainable_parameters()
    processor = build_processor(model.config)
    videos = data_arguments.eval_videos()
    trainer = Trainer(
        model,
        training_arguments,
        train_dataset=data_arguments.train_dataset(model.config.image_size, training_arguments.seed),
        data_collator=PromptedCollator(data_arguments.prompts),
    )
    if videos:
        print(f"mean IoU before: {mean_iou(evaluate_videos(model, processor, videos)):.3f}")
    trainer.train()
    trainer.save_model()
    processor.save_pretrained(training_arguments.output_dir)
    if videos:
        print(f"mean IoU after: {mean_iou(evaluate_videos(model, processor, videos)):.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
