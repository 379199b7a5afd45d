"""A training step beside the original's way of doing the same work, and what its time goes to.

python scripts/benchmarks/training.py --model model_tiny --frames 8 --objects 3
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from experts import dense_forward
from measure import (
    Measurement,
    at_least,
    autocast,
    benchmark_parser,
    measure,
    prepare,
    to_markdown,
    without_dropout,
    write_results,
)
from samoe_hf.evaluation.report import format_table
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.expert_layer import expert_modules
from samoe_hf.model.frame_step import encode_frames
from samoe_hf.model.modeling_samoe import SamoeModel


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--frames", type=at_least(2), default=8, help="of a clip (%(default)s)")
    parser.add_argument("--objects", type=at_least(1), default=3, help="of a clip (%(default)s)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="run frames again in the backward pass")
    parser.add_argument("--encoder-batch-size", type=at_least(1), help="frames encoded at once; all by default")
    parsed = parser.parse_args(arguments)
    config, dtype = prepare(parsed)
    shape = (parsed.frames, parsed.objects, parsed.repeats, parsed.device)
    settings = (dtype, parsed.gradient_checkpointing, parsed.encoder_batch_size)
    whole, original, encoder, forward, both = benchmark_training(config, *shape, *settings)
    parts = {
        "encoder": encoder.median,
        "tracking and loss": forward.median - encoder.median,
        "backward": both.median - forward.median,
        "optimizer": whole.median - both.median,
    }
    rows = [[name, f"{1e3 * max(seconds, 0):.2f}"] for name, seconds in parts.items()]
    steps = [whole, original]
    tables = [to_markdown(steps, "samoe_hf", "clip"), format_table(["part of a step", "median, ms"], rows, True)]
    title = f"Training: one clip of {parsed.frames} frames, {parsed.objects} objects, {parsed.dtype}"
    write_results(parsed.output, "train", title, steps, "\n\n".join(tables), parsed.device)


if __name__ == "__main__":
    main()
