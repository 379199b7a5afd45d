"""Other ways than the gate to give a video a domain's experts: MILE's prototypes, and SAMCL's learned selector.

Both read the mean of what the plain encoder makes of a frame, and know no strangers: each video gets some domain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from samoe_hf.data.schema import Video, evenly_chosen
from samoe_hf.inference import evaluation_mode
from samoe_hf.model.frame_step import encode_frames
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.video_session import PreparedFrames

Choose = Callable[[Tensor], str]  # takes a frame's features (channels,)
SAMCL_BLOCK = 2  # of the third stage, as in SAMCL's code for SAM 2
SAMCL_EPOCHS, SAMCL_BATCH_SIZE, SAMCL_LEARNING_RATE = 25, 24, 0.01


@dataclass(frozen=True)
class Selector:
    """A way to choose a domain.

    Attributes:
        features: takes the base and frames (frames, 3, S, S), and gives what is read of each (frames, channels).
        fit: takes domain -> features of its frames, and gives the choice and the tensors that it is made of.
    """

    features: Callable[[SamoeModel, Tensor], Tensor]
    fit: Callable[[Mapping[str, Tensor]], tuple[Choose, dict[str, Tensor]]]


@torch.no_grad()
def selector_features(selector: Selector, base: SamoeModel, videos: Sequence[Video], count: int) -> Tensor:
    """What a selector reads of about so many frames that show objects, of all videos equally many; (frames, channels).

    Args:
        base: the model without domains.
        count: 1 gives the first such frame of a video, which is what is prompted.
    """
    processor, features = build_processor(base.config), []
    for video in evenly_chosen(videos, count):
        shown = [t for t in video.annotated_frames if video.visible(t)] or [0]
        chosen = evenly_chosen(shown, max(1, count // len(videos)))
        frames = PreparedFrames(video.frames, video.size, processor, base.device, base.dtype)
        with evaluation_mode(base):
            features.append(selector.features(base, torch.stack([frames[t] for t in chosen])))
    return torch.cat(features)


def _coarse_features(base: SamoeModel, frames: Tensor) -> Tensor:
    return encode_frames(base, frames).coarse.mean((2, 3))


def _fit_prototypes(features: Mapping[str, Tensor]) -> tuple[Choose, dict[str, Tensor]]:
    """The domain whose mean features point most nearly where a frame's do, as in MILE (arXiv:2605.03555)."""
    prototypes = {name: of.mean(0) for name, of in features.items()}

    def choose(frame: Tensor) -> str:
        return max(prototypes, key=lambda name: float(torch.cosine_similarity(frame, prototypes[name], dim=0)))

    return choose, prototypes


def _block_features(base: SamoeModel, frames: Tensor) -> Tensor:
    """The mean output of an early block of the encoder's third stage."""
    sizes, found = base.config.vision_config.backbone_config.blocks_per_stage, []
    block = base.vision_encoder.backbone.blocks[sum(sizes[:2]) + min(SAMCL_BLOCK, sizes[2] - 1)]
    hook = block.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        encode_frames(base, frames)
    finally:
        hook.remove()
    return found[0].mean((1, 2))


def _fit_mlp(features: Mapping[str, Tensor]) -> tuple[Choose, dict[str, Tensor]]:
    """A small network that tells the frames of all domains apart, as in SAMCL (arXiv:2412.05012).

    Its layers, optimizer and epochs are those of SAMCL's code. It is trained anew with each domain, and what was
    read of earlier ones is stored for that.
    """
    names, (inputs, targets) = list(features), _joined(features)
    width, device = inputs.shape[1], inputs.device
    network = nn.Sequential(
        nn.Linear(width, width), nn.BatchNorm1d(width),
        nn.Linear(width, width // 4), nn.BatchNorm1d(width // 4), nn.ReLU(),
        nn.Linear(width // 4, width // 4), nn.BatchNorm1d(width // 4), nn.ReLU(),
        nn.Linear(width // 4, len(names)),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(network.parameters(), lr=SAMCL_LEARNING_RATE)
    batch_size = min(SAMCL_BATCH_SIZE, len(inputs))
    batches = DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=True, drop_last=True)
    for _ in range(SAMCL_EPOCHS):
        for batch, target in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(batch), target).backward()
            optimizer.step()
    network.eval()

    @torch.no_grad()
    def choose(frame: Tensor) -> str:
        return names[int(network(frame[None])[0].argmax())]

    return choose, {f"selector.{name}": tensor for name, tensor in network.state_dict().items()} | dict(features)


def _joined(features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Features of all domains (frames, channels), and the number of each frame's domain (frames,)."""
    numbers = [torch.full((len(of),), number, device=of.device) for number, of in enumerate(features.values())]
    return torch.cat(list(features.values())), torch.cat(numbers)


SELECTORS = {"prototypes": Selector(_coarse_features, _fit_prototypes), "samcl": Selector(_block_features, _fit_mlp)}
