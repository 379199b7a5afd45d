"""Trains the small base, on single frames or on clips.

    python scripts/small_base/learn.py frames.yaml
    python scripts/small_base/learn.py clips.yaml --resume_from_checkpoint last

is `samoe train` with a further kind of dataset, "cutouts", and with Muon. Runs of single frames prompt more objects in
less time than `samoe train`: each frame is encoded once, nothing is remembered, and masks are compared as they are
predicted, at a quarter of the frame's size. With `--clicks` a run of clips learns this of their first frames as well.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutouts import LAYOUT
from muon import MuonAndAdamW
from samoe_hf.commands.train import parse_arguments
from samoe_hf.data.layouts import LAYOUTS
from samoe_hf.errors import InputError
from samoe_hf.model.base_modules import ImageFeatures
from samoe_hf.model.frame_step import embed_prompt, encode_frames, resize
from samoe_hf.model.losses import SegmentationLoss, focal_and_dice, mask_iou
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.prompt_recipe import sample_box, sample_point_from_errors
from samoe_hf.model.prompts import PREVIOUS_MASK_LIMIT, Prompt
from samoe_hf.training.trainer import SamoeTrainer, build_trainer

CLICKS = "--clicks"
SMALLEST = 60  # pixels of an object that is prompted
OF_BOXES, OF_CLICKED_BOXES = 0.35, 0.3  # shares: of objects that are given by a box, of steps that correct those
SINGLE = 0.25  # weight of the one mask that is wanted of what is known well, beside the best of three


class MuonTrainer(SamoeTrainer):
    """Trains with Muon."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        return MuonAndAdamW, {}


class FrameTrainer(MuonTrainer):
    """Trains clicks and boxes on clips of one frame."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss = first_frames_loss(self.model, inputs)
        return (loss, None) if return_outputs else loss


class ClickedClipTrainer(MuonTrainer):
    """Trains on clips, and clicks and boxes on their first frames."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result, extra = super().compute_loss(model, inputs, *args, **kwargs), first_frames_loss(self.model, inputs)
        return (result[0] + extra, *result[1:]) if isinstance(result, tuple) else result + extra


def first_frames_loss(model: SamoeModel, inputs: dict[str, Any]) -> Tensor:
    """The mean loss of the objects on the first frames of clips, 0 if none is large enough.

    An object gets a box and at times a click where the mask is wrong, or one to three clicks.

    Args:
        inputs: a batch, with `pixel_values` (B, T, 3, S, S) and `labels` (B, N, T, S, S).
    """
    masks = inputs["labels"][:, :, 0] == 1
    frame, column = (masks.sum((2, 3)) >= SMALLEST).nonzero(as_tuple=True)
    masks, image = masks[frame, column], encode_frames(model, inputs["pixel_values"][:, 0])
    by_box, loss = torch.rand(len(masks)) < OF_BOXES, image.coarse.sum() * 0
    for boxes in (False, True):
        chosen = by_box == boxes
        if chosen.any():
            points = sample_box(masks[chosen]) if boxes else sample_point_from_errors(masks[chosen])
            rounds = 1 + int(torch.rand(()) < OF_CLICKED_BOXES) if boxes else int(torch.randint(1, 4, ()))
            loss = loss + prompted_loss(model, image, frame[chosen], masks[chosen], points, rounds)
    return loss / max(1, len(masks))


def prompted_loss(
    model: SamoeModel, image: ImageFeatures, frame: Tensor, masks: Tensor, given: tuple[Tensor, Tensor], rounds: int
) -> Tensor:
    """Summed over objects, the mean loss of some rounds, after each of which a click says where the mask is wrong.

    Args:
        image: of all frames.
        frame: (objects,), the row in `image` of each.
        masks: (objects, S, S) bool, the true masks.
        given: points (objects, points, 2) and their labels (objects, points).
    """
    (points, labels), previous, losses = given, None, []
    truth = F.avg_pool2d(masks[:, None].float(), masks.shape[-1] // image.fine.shape[-1])
    levels = [image.fine[frame], image.middle[frame]]
    coarse = (image.coarse + model.no_memory_embedding.view(1, -1, 1, 1))[frame]
    for number in range(rounds):
        sparse, dense = embed_prompt(model, Prompt(points, labels, previous_mask=previous), len(masks))
        decoded = model.mask_decoder.candidates(coarse, image.decoder_position, sparse, dense, levels)
        candidates, ious = decoded[0][:, 0], decoded[1][:, 0]
        losses.append(candidates_loss(model.clip_settings.loss, candidates, ious, truth))
        if number + 1 < rounds:
            best = candidates[torch.arange(len(ious)), 1 + ious[:, 1:].argmax(dim=1)].unsqueeze(1).detach()
            click, label = sample_point_from_errors(masks, resize(best, masks.shape[-1])[:, 0] > 0)
            points, labels = torch.cat([points, click], dim=1), torch.cat([labels, label], dim=1)
            previous = best.clamp(-PREVIOUS_MASK_LIMIT, PREVIOUS_MASK_LIMIT)
    return torch.stack(losses).mean(dim=0).sum()


def candidates_loss(settings: SegmentationLoss, candidates: Tensor, ious: Tensor, truth: Tensor) -> Tensor:
    """The loss (objects,) of the one mask and the best of three, and of all their estimated IoU.

    Args:
        candidates: (objects, 4, H, W), logits, the one mask first.
        ious: (objects, 4).
        truth: (objects, 1, H, W), the part of each pixel that the object covers.
    """
    focal, dice = focal_and_dice(candidates, truth, settings.focal_alpha, settings.focal_gamma)
    wrong = settings.focal_weight * focal + settings.dice_weight * dice
    with torch.no_grad():
        true_ious = mask_iou(candidates, truth - 0.5)
    estimate = settings.iou_weight * (ious - true_ious).abs().mean(dim=1)
    return wrong[:, 1:].amin(dim=1) + SINGLE * wrong[:, 0] + estimate


def build(arguments: Sequence[str]) -> SamoeTrainer:
    """The trainer of a run, from its YAML and options."""
    LAYOUTS[LAYOUT.kind] = LAYOUT
    run = build_trainer([word for word in arguments if word != CLICKS])
    kind = ClickedClipTrainer if CLICKS in arguments else MuonTrainer
    if run.train_dataset[0]["pixel_values"].shape[0] == 1:
        kind = FrameTrainer
    return kind(run.model, run.args, run.recipe, processing_class=run.processor, train_dataset=run.train_dataset)


def main(arguments: Sequence[str]) -> None:
    """Trains, and writes the model to `output_dir`."""
    try:
        trainer = build(parse_arguments(arguments).run)
        trainer.train(trainer.args.resume_from_checkpoint)
    except InputError as error:
        raise SystemExit(str(error)) from error
    trainer.save_model()
    print(f"Written: the model, in {trainer.args.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
