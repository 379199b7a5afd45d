"""A training step beside the original's way of doing the same work and in Meta's order, and what its time goes to.

python scripts/benchmarks/training.py --model model_tiny --frames 8 --objects 3 --peers transformers sam2
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experts import dense_forward
from measure import (
    Measurement,
    at_least,
    autocast,
    benchmark_parser,
    measure,
    prepare,
    synchronize,
    to_markdown,
    write_results,
)
from meta_order import PEERS, without_dropout
from samoe_hf.data import ClipCollator, ClipDataset, SyntheticVideos
from samoe_hf.data.registry import load_videos
from samoe_hf.data.schema import Video
from samoe_hf.evaluation.report import format_table
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.expert_layer import expert_modules, is_expert_parameter
from samoe_hf.model.frame_step import encode_frames
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.training.feature_cache import FeatureCache


def benchmark_training(
    config: SamoeConfig,
    num_frames: int,
    num_objects: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    encoder_batch_size: int | None = None,
) -> list[Measurement]:
    """A step over one clip with experts trained, mask prompts and no clicks.

    The baseline is SAM2-MoE's trainer: a clip of one object at a time, each frame encoded by itself, dense experts.

    Args:
        dtype: bfloat16 and float16 by autocast.

    Raises:
        AssertionError: in float32, if both ways give different gradients.
    """
    torch.manual_seed(0)
    model = SamoeModel(config).to(device).train()
    without_dropout(model)  # or the two ways would not compute the same
    for _, module in expert_modules(model):
        nn.init.normal_(module.lora_B, std=0.02)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.clip_settings.encoder_batch_size = encoder_batch_size
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    clip = example_clip(config.image_size, num_frames, num_objects, device)

    def encode() -> None:
        with autocast(device, dtype), torch.no_grad():
            encode_frames(model, clip["pixel_values"].flatten(0, 1), encoder_batch_size)

    def forward() -> Tensor:
        with autocast(device, dtype):
            return model(**clip).loss

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    def original_step() -> None:
        optimizer.zero_grad()
        with _dense_experts(model), autocast(device, dtype):
            model.clip_settings.encoder_batch_size = 1
            for index in range(num_objects):
                one = {**clip, "labels": clip["labels"][:, index : index + 1]}
                (model(**one).loss / num_objects).backward()
            model.clip_settings.encoder_batch_size = encoder_batch_size
        optimizer.step()

    if dtype == torch.float32:
        _check_equal_gradients(model, step, original_step)
    case = f"{num_frames} frames, {num_objects} objects"
    results = measure(case, {"samoe_hf": step, "original's way": original_step}, repeats, device, memory=True)
    parts = {"encoder": encode, "forward": forward, "forward and backward": lambda: forward().backward()}
    return results + measure(f"{case}, parts", parts, repeats, device)


def benchmark_order(
    config: SamoeConfig, peers: Sequence[str], num_frames: int, num_objects: int, repeats: int, device: torch.device
) -> list[Measurement]:
    """Forward and backward over one clip beside Meta's order of work, in float32, without dropout and clicks.

    Ours has experts, without effect yet, so that all have the same loss; theirs has none.

    Args:
        peers: whose modules do it, see [`meta_order.PEERS`].

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

    measurements = []
    with tempfile.TemporaryDirectory() as folder:
        for case, trained in {"everything trained": lambda _: True, "encoder frozen": _not_of_encoder}.items():
            steps = {"samoe_hf": ours(trained)}
            steps |= {f"Meta's order, {name}": theirs(other, trained) for name, other in others.items()}
            if trained is _not_of_encoder:
                steps["samoe_hf, experts alone"] = ours(is_expert_parameter)
                steps["samoe_hf, experts, cached features"] = ours(is_expert_parameter, FeatureCache(folder))
            measurements += measure(case, steps, repeats, device)
    return measurements


def _not_of_encoder(name: str) -> bool:
    return not name.startswith(("vision_encoder.", "image_encoder."))


def _train(model: nn.Module, trained: Callable[[str], bool]) -> None:
    """Makes the parameters of some names trainable, and drops all gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
        parameter.grad = None


def example_clip(image_size: int, num_frames: int, num_objects: int, device: torch.device) -> dict[str, Tensor]:
    """A clip with exactly so many objects, each there on every frame."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(1, num_frames, 3, image_size, image_size, generator=generator)
    labels = torch.zeros(1, num_objects, num_frames, image_size, image_size, dtype=torch.bool)
    side = image_size // 4
    for index in range(num_objects):
        for t in range(num_frames):
            left = (index * side // 2 + t * 4) % (image_size - side)
            labels[0, index, t, left : left + side, side : 2 * side] = True
    return {"pixel_values": frames.to(device), "labels": labels.to(device)}


@contextmanager
def _dense_experts(model: SamoeModel) -> Iterator[None]:
    modules = [module for _, module in expert_modules(model)]
    for module in modules:
        module.forward = partial(dense_forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _check_equal_gradients(model: SamoeModel, step, original_step) -> None:
    gradients = []
    for run in (step, original_step):
        run()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        if (gradient - gradients[1][name]).norm() > 1e-2 * gradient.norm() + 1e-6:
            raise AssertionError(f"The gradients of {name} differ between the two ways.")


def measure_waiting(
    config: SamoeConfig,
    videos: Sequence[Video] | None,
    num_frames: int,
    num_objects: int,
    num_workers: int,
    num_steps: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Measurement, Measurement]:
    """How long a step takes, and how long it first waits for the data loader's workers.

    Args:
        videos: where clips are drawn from; synthetic ones of 480p if None.
    """
    model = SamoeModel(config).to(device).train()
    if videos is None:
        videos = SyntheticVideos(64, 2 * num_frames, (480, 854), max_objects=num_objects)
    clips = ClipDataset(
        videos,
        build_processor(config),
        num_frames=num_frames,
        max_objects=num_objects,
        clips_per_video=-(-(num_steps + 4) // len(videos)),
    )
    loader = DataLoader(clips, collate_fn=ClipCollator(), num_workers=num_workers)
    waiting, stepping = Measurement("step", "waiting for data"), Measurement("step", "computing")
    batches = iter(loader)
    for index in range(num_steps + 2):
        start = time.perf_counter()
        batch = {name: x.to(device) for name, x in next(batches).items() if isinstance(x, Tensor)}
        arrived = time.perf_counter()
        with autocast(device, dtype):
            loss = model(**batch).loss
        loss.backward()
        synchronize(device)
        if index >= 2:  # workers start, kernels warm up
            waiting.seconds.append(arrived - start)
            stepping.seconds.append(time.perf_counter() - arrived)
    return waiting, stepping


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--frames", type=at_least(2), default=8, help="of a clip (%(default)s)")
    parser.add_argument("--objects", type=at_least(1), default=3, help="of a clip (%(default)s)")
    parser.add_argument(
        "--peers", nargs="*", default=["transformers"], choices=list(PEERS), help="whose modules do it in Meta's order"
    )
    parser.add_argument("--workers", type=at_least(0), default=2, help="of the data loader (%(default)s)")
    parser.add_argument("--steps", type=at_least(1), default=20, help="steps with the data loader (%(default)s)")
    parser.add_argument("--davis", type=Path, help="draw its clips from this DAVIS folder, not from synthetic videos")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="run frames again in the backward pass")
    parser.add_argument("--encoder-batch-size", type=at_least(1), help="frames encoded at once; all by default")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    config, dtype = prepare(parsed)
    shape = (parsed.frames, parsed.objects, parsed.repeats, parsed.device)
    settings = (dtype, parsed.gradient_checkpointing, parsed.encoder_batch_size)
    whole, original, encoder, forward, both = benchmark_training(config, *shape, *settings)
    videos = None if parsed.davis is None else load_videos("davis", parsed.davis)
    loading = (parsed.frames, parsed.objects, parsed.workers, parsed.steps, parsed.device, dtype)
    waiting, computing = measure_waiting(config, videos, *loading)
    parts = {
        "encoder": encoder.median,
        "tracking and loss": forward.median - encoder.median,
        "backward": both.median - forward.median,
        "optimizer": whole.median - both.median,
        f"waiting for {parsed.workers} workers": waiting.median,
        "a whole step beside the data loader": computing.median,
    }
    rows = [[name, f"{1e3 * max(seconds, 0):.2f}"] for name, seconds in parts.items()]
    steps = [whole, original]
    tables = [to_markdown(steps, "samoe_hf", "clip"), format_table(["part of a step", "median, ms"], rows, True)]
    if parsed.peers:
        beside = benchmark_order(config, parsed.peers, *shape)
        tables += ["Forward and backward in float32, no dropout:", to_markdown(beside, "samoe_hf", "clip")]
        steps += beside
    title = f"Training: one clip of {parsed.frames} frames, {parsed.objects} objects, {parsed.dtype}"
    write_results(parsed.output, "train", title, steps, "\n\n".join(tables), parsed.device)


if __name__ == "__main__":
    main()
