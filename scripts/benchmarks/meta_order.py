"""A training step in the order of work of Meta's trainer, of others' modules: what it takes without experts.

Meta's training code (`training/model/sam2.py`) is no package, but the modules that it runs are those of `sam2`, and
transformers has its own. Of a clip with mask prompts and no clicks it encodes all frames at once, copies their features
for each object, and runs a frame's objects through memory attention, mask decoder and memory encoder in one batch. All
candidates are resized to the input and get a loss, of which the best one's counts (`training/loss_fns.py`).

python scripts/benchmarks/meta_order.py --model model_micro --peers transformers sam2
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss
from transformers import Sam2VideoModel

from count_kernels import count_kernels
from measure import (
    Measurement,
    at_least,
    benchmark_parser,
    measure,
    prepare,
    to_markdown,
    without_dropout,
    write_results,
)
from peers import sam2_of
from samoe_hf.evaluation.report import format_table
from samoe_hf.model.base_model import SamoePreTrainedModel
from samoe_hf.model.base_modules import CachedPositionEncoding, ImageFeatures
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.frame_step import encode_frames, frame_step, memory_limits
from samoe_hf.model.losses import SegmentationLoss, mask_iou
from samoe_hf.model.memory_attention import RotaryEmbedding
from samoe_hf.model.memory_bank import MemoryBank
from samoe_hf.model.memory_selection import remember, select_memories
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.prompts import Prompt
from samoe_hf.training.feature_cache import FeatureCache
from training import example_clip


class TransformersClip:
    """Clips by the modules of [`~transformers.Sam2VideoModel`].

    They are called in the order of our frame step, whose glue between them is Meta's. What transformers computes anew
    in each call, though Meta keeps it, is kept: encodings of positions.
    """

    def __init__(self, model: SamoeModel):
        theirs = Sam2VideoModel(copy.deepcopy(model.config))
        own = {name: tensor for name, tensor in model.state_dict().items() if not is_expert_parameter(name)}
        theirs.load_state_dict(own)
        for owner in (theirs.vision_encoder.neck, theirs.memory_encoder):
            owner.position_encoding = CachedPositionEncoding(owner.position_encoding)
        # The frame step's model, with their modules.
        self.model = SamoePreTrainedModel(copy.deepcopy(model.config))
        for name, module in theirs.named_children():
            self.model.add_module(name, module)
        for name, parameter in theirs.named_parameters(recurse=False):
            self.model.register_parameter(name, parameter)
        self.model.memory_attention = _ByModule(theirs.memory_attention)
        without_dropout(self.model.to(model.device).train(model.training))

    def __call__(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """The loss of a clip (1, T, 3, S, S) of N objects (1, N, T, S, S)."""
        (_, num_objects, num_frames), model = labels.shape[:3], self.model
        features = encode_frames(model, pixel_values[0])
        banks, loss = [MemoryBank() for _ in range(num_objects)], 0.0
        limits = memory_limits(model, num_frames)._replace(past_pointers_only=True)
        for t in range(num_frames):
            rows = torch.full((num_objects,), t)
            image = ImageFeatures(*(x[rows] for x in features[:3]), *features[3:])
            prompt = Prompt(mask=labels[0, :, :1]) if t == 0 else None
            selections = [select_memories("recent", bank, t, limits) for bank in banks if t > 0]
            output = frame_step(model, image, prompt, banks, selections, num_objects=num_objects)
            for row, bank in enumerate(banks):
                remember(bank, t, output.memory.row(row), conditioning=t == 0)
            loss = loss + _loss(output.candidates, output.iou_scores, output.object_score_logits, labels[0, :, t])
        return loss / num_objects


class _ByModule(nn.Module):
    """transformers' own memory attention, called as ours is; see [`~memory_attention.MemoryAttention`]."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.layers, self.layer_norm = attention.layers, attention.layer_norm  # by the names that they have in both
        self.position_ids, self._run = attention.position_ids, attention.forward
        self.rotary_emb = RotaryEmbedding(attention.rotary_emb)

    def forward(
        self, image: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        num_objects, num_tokens = image.shape[:2]
        conditioned = self._run(
            current_vision_features=image.transpose(0, 1),
            memory=memory.transpose(0, 1),
            current_vision_position_embeddings=position.expand(num_objects, -1, -1).transpose(0, 1),
            memory_posision_embeddings=memory_position.expand(num_objects, -1, -1).transpose(0, 1),
            num_object_pointer_tokens=memory.shape[1] % num_tokens,
        )
        return conditioned.squeeze(1).transpose(0, 1) if conditioned.dim() == 3 else conditioned.flatten(0, 1)


class Sam2Clip:
    """Clips by the modules of `sam2`, which are those of Meta's trainer. It needs the extra `bench`."""

    def __init__(self, model: SamoeModel):
        self.model = without_dropout(sam2_of(model).train(model.training))

    def __call__(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """As [`TransformersClip`]."""
        (_, num_objects, num_frames), model = labels.shape[:3], self.model
        _, features, positions, sizes = model._prepare_backbone_features(model.forward_image(pixel_values[0]))
        memories: dict[str, dict] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        loss = 0.0
        for t in range(num_frames):
            rows = torch.full((num_objects,), t)
            own, own_positions = ([x[:, rows] for x in tensors] for tensors in (features, positions))
            mask = labels[0, :, :1].to(pixel_values.dtype) if t == 0 else None
            output, heads, _, _ = model._track_step(
                t, t == 0, own, own_positions, sizes, None, mask, memories, num_frames, False, None
            )
            _, candidates, iou_scores, _, high_res_masks, pointers, object_scores = heads
            output["obj_ptr"] = pointers
            model._encode_memory_in_output(own, sizes, None, True, high_res_masks, object_scores, output)
            memories["cond_frame_outputs" if t == 0 else "non_cond_frame_outputs"][t] = output
            loss = loss + _loss(candidates, iou_scores, object_scores, labels[0, :, t])
        return loss / num_objects


def _loss(candidates: Tensor, iou_scores: Tensor, object_score_logits: Tensor, labels: Tensor) -> Tensor:
    """A frame's loss, summed over objects; arguments are as of [`~losses.SegmentationLoss`]."""
    weights = SegmentationLoss()
    size = labels.shape[-2:]
    if candidates.shape[-2:] != size:
        candidates = F.interpolate(candidates, size, mode="bilinear", align_corners=False)
    targets = labels.to(candidates.dtype).unsqueeze(1).expand_as(candidates)
    present = targets[:, 0].flatten(1).any(dim=1).to(candidates.dtype)
    focal = sigmoid_focal_loss(candidates, targets, weights.focal_alpha, weights.focal_gamma).flatten(-2).mean(dim=-1)
    masks = weights.focal_weight * focal + weights.dice_weight * dice_loss(candidates, targets)
    best = masks.gather(1, masks.argmin(dim=1, keepdim=True))[:, 0]
    iou = (iou_scores - mask_iou(candidates, targets)).abs().mean(dim=1)
    score = F.binary_cross_entropy_with_logits(object_score_logits[:, 0], present, reduction="none")
    return ((best + weights.iou_weight * iou) * present + weights.object_score_weight * score).sum()


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Soft dice loss, smoothed by 1: logits and targets (..., H, W) -> (...)."""
    probability, targets = logits.sigmoid().flatten(-2), targets.flatten(-2)
    intersection = (probability * targets).sum(dim=-1)
    return 1 - (2 * intersection + 1) / (probability.sum(dim=-1) + targets.sum(dim=-1) + 1)


PEERS: dict[str, Callable[[SamoeModel], Callable[[Tensor, Tensor], Tensor]]] = {
    "transformers": TransformersClip,
    "sam2": Sam2Clip,
}


def benchmark_order(
    config: SamoeConfig, peers: Sequence[str], num_frames: int, num_objects: int, repeats: int, device: torch.device
) -> tuple[list[Measurement], list[list[str]]]:
    """Forward and backward over one clip beside Meta's order of work, in float32, without dropout and clicks.

    Ours has experts, without effect yet, so that all have the same loss; theirs has none. Also counts each one's
    kernels, see [`~count_kernels.count_kernels`], in rows of a table.

    Args:
        peers: whose modules do it, see `PEERS`.

    Raises:
        AssertionError: if the losses differ.
    """
    torch.manual_seed(0)
    model = without_dropout(SamoeModel(config).to(device).train())
    others = {name: PEERS[name](model) for name in peers}
    clip = example_clip(config.image_size, num_frames, num_objects, device)
    losses = {name: other(**clip).item() for name, other in others.items()}
    losses["samoe_hf"] = model(**clip, prompts="mask").loss.item()
    if max(losses.values()) - min(losses.values()) > 1e-5 * abs(losses["samoe_hf"]):
        raise AssertionError(f"The losses differ: {losses}.")

    def ours(trained: Callable[[str], bool], cache: FeatureCache | None = None) -> Callable[[], None]:
        def step() -> None:
            _train(model, trained)
            model.clip_settings.feature_cache = cache
            model(**clip, prompts="mask").loss.backward()

        return step

    def theirs(other: Callable[..., Tensor], trained: Callable[[str], bool]) -> Callable[[], None]:
        def step() -> None:
            _train(other.model, trained)
            other(**clip).backward()

        return step

    measurements, kernels = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case, trained in {"everything trained": lambda _: True, "encoder frozen": _not_of_encoder}.items():
            steps = {"samoe_hf": ours(trained)}
            steps |= {f"Meta's order, {name}": theirs(other, trained) for name, other in others.items()}
            if trained is _not_of_encoder:
                steps["samoe_hf, experts alone"] = ours(is_expert_parameter)
                steps["samoe_hf, experts, cached features"] = ours(is_expert_parameter, FeatureCache(folder))
            measurements += measure(case, steps, repeats, device)
            kernels += [[case, name, str(count_kernels(step, model).total())] for name, step in steps.items()]
    return measurements, kernels


def _not_of_encoder(name: str) -> bool:
    return not name.startswith(("vision_encoder.", "image_encoder."))


def _train(model: nn.Module, trained: Callable[[str], bool]) -> None:
    """Makes the parameters of some names trainable, and drops all gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
        parameter.grad = None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--frames", type=at_least(2), default=8, help="of a clip (%(default)s)")
    parser.add_argument("--objects", type=at_least(1), default=3, help="of a clip (%(default)s)")
    parser.add_argument("--peers", nargs="+", default=["transformers"], choices=list(PEERS), help="whose modules do it")
    parsed = parser.parse_args(arguments)
    config, _ = prepare(parsed)
    size = parsed.frames, parsed.objects
    steps, kernels = benchmark_order(config, parsed.peers, *size, parsed.repeats, parsed.device)
    title = f"Forward and backward in float32, no dropout: {parsed.frames} frames, {parsed.objects} objects"
    tables = [
        to_markdown(steps, "samoe_hf", "clip"),
        format_table(["case", "contender", "kernels"], kernels, markdown=True),
    ]
    write_results(parsed.output, "order", title, steps, "\n\n".join(tables), parsed.device)


if __name__ == "__main__":
    main()
