"""See it work: train a small model on synthetic videos, and look at its masks and its experts.

    samoe demo                      # a small model from random weights, all of it trained
    samoe demo --model FOLDER       # any checkpoint; only its experts are trained

It needs no download and less than five minutes on two CPU cores. Pictures are left in `outputs/demo`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor, Sam2VideoProcessor, Trainer, TrainingArguments

from samoe_hf import SamoeModel
from samoe_hf.analysis.usage import expert_usage
from samoe_hf.data import ClipCollator, ClipDataset, SyntheticVideos, Video, write_palette_png, write_video
from samoe_hf.evaluation.evaluate import evaluate_videos, mean_iou, segment_video
from samoe_hf.inference import VideoPrompt, track_video
from samoe_hf.model.processor import build_processor
from samoe_hf.plots.masks import overlay_masks, plot_frames
from samoe_hf.training.arguments import ModelArguments

from .options import command_parser

CONFIGS = Path(__file__).parents[1] / "configs"
NUM_TRAIN_VIDEOS, NUM_TRAIN_FRAMES = 2000, 4
NUM_TEST_VIDEOS, NUM_TEST_FRAMES = 6, 12
SHOWN_FRAMES = range(0, NUM_TEST_FRAMES, 2)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("demo", __doc__)
    parser.add_argument("--model", help="folder, Hub id or original checkpoint, in place of the small model")
    parser.add_argument("--experts", help="with an original checkpoint: the file of its experts")
    parser.add_argument("--config", help="with an original checkpoint: its YAML, needed for sizes other than Meta's")
    parser.add_argument("--domain", default="shapes", help="of the synthetic videos: shapes, blobs, echoes or stripes")
    parser.add_argument("--steps", type=int, default=280, help="steps of training")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def load_model(arguments: argparse.Namespace) -> SamoeModel:
    """The small model with everything trainable, or a checkpoint with its experts trainable."""
    if arguments.model is not None:
        chosen = ModelArguments(arguments.model, experts=arguments.experts, config=arguments.config)
        return chosen.load()
    model = ModelArguments(model_config=str(CONFIGS / "model_nano.yaml")).load()
    model.set_trainable("all")
    return model


def print_summary(model: SamoeModel) -> None:
    print(model.summary())


def train(model: SamoeModel, processor: Sam2VideoProcessor, arguments: argparse.Namespace) -> None:
    """Trains on clips of synthetic videos through `transformers.Trainer`."""
    size = model.config.image_size
    videos = SyntheticVideos(NUM_TRAIN_VIDEOS, NUM_TRAIN_FRAMES, (size, size), domain=arguments.domain, seed=1)
    training_arguments = TrainingArguments(
        output_dir=arguments.output / "training",
        max_steps=arguments.steps,
        per_device_train_batch_size=4 if arguments.model is None else 1,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, arguments.steps // 10),
        max_grad_norm=1.0,
        logging_steps=max(1, arguments.steps // 10),
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )
    trainer = Trainer(
        model,
        training_arguments,
        train_dataset=ClipDataset(videos, processor, num_frames=NUM_TRAIN_FRAMES, seed=arguments.seed),
        data_collator=ClipCollator(),
    )
    trainer.train()


def draw_tracking(model: SamoeModel, processor: Sam2VideoProcessor, videos: Sequence[Video], output: Path) -> None:
    """Writes each video with its tracked objects, their masks, and a picture with the truth above the prediction."""
    rows = {}
    for number, video in enumerate(videos):
        given = zip(video.object_ids, video.masks(0), strict=True)
        prompts = [VideoPrompt(object_id, mask=mask) for object_id, mask in given]
        predicted = [tracked.id_map() for tracked in track_video(model, processor, video.frames, prompts)]
        ids = np.array(video.object_ids)[:, None, None]
        true = [(video.masks(t) * ids).max(axis=0) for t in range(len(video))]
        folder = output / "masks" / video.video_id
        folder.mkdir(parents=True, exist_ok=True)
        for t, id_map in enumerate(predicted):
            write_palette_png(folder / f"{t:05d}.png", id_map)
        overlays = [overlay_masks(frame, id_map) for frame, id_map in zip(video.frames, predicted, strict=True)]
        write_video(output / f"video_{number}.mp4", overlays, fps=6)
        rows[f"video {number}: true"] = [overlay_masks(video.frames[t], true[t]) for t in SHOWN_FRAMES]
        rows[f"video {number}: tracked"] = [overlays[t] for t in SHOWN_FRAMES]
    title = "Held-out videos, objects prompted by their masks on frame 0"
    plot_frames(rows, [f"frame {t}" for t in SHOWN_FRAMES], output / "tracking.png", title)


def masks_agree(first: SamoeModel, second: SamoeModel, processor: Sam2VideoProcessor, video: Video) -> bool:
    """Whether two models track a video to the same masks."""
    return bool((segment_video(first, processor, video)[0] == segment_video(second, processor, video)[0]).all())


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    torch.manual_seed(parsed.seed)
    parsed.output.mkdir(parents=True, exist_ok=True)
    model = load_model(parsed)
    print_summary(model)
    processor = build_processor(model.config)
    size = (model.config.image_size, model.config.image_size)
    test_videos = list(SyntheticVideos(NUM_TEST_VIDEOS, NUM_TEST_FRAMES, size, domain=parsed.domain, seed=2))

    before = mean_iou(evaluate_videos(model, processor, test_videos))
    train(model, processor, parsed)
    after = mean_iou(evaluate_videos(model.eval(), processor, test_videos))

    saved = parsed.output / "model"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    reloaded = SamoeModel.from_pretrained(saved).to(model.device)
    processor = AutoProcessor.from_pretrained(saved)
    agree = masks_agree(model, reloaded, processor, test_videos[0])
    draw_tracking(reloaded, processor, test_videos[:3], parsed.output)
    usage = expert_usage(reloaded, test_videos[:3], processor)
    usage.plot("usage_heat_maps").savefig(parsed.output / "expert_usage.png", dpi=120)

    print(f"Mean IoU on {len(test_videos)} held-out videos, frames after the prompted one: {before:.3f} -> {after:.3f}")
    print(f"Saved and reloaded: masks {'are identical' if agree else 'DIFFER'}")
    print(f"Pictures in {parsed.output}: tracking.png, video_0.mp4 ..., expert_usage.png; masks in masks/")
