"""The parts of a frame's work, each beside the least time that the device needs for its arithmetic and its data."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from measure import Measurement, autocast, measure
from peers import TransformersTracker
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.modeling_samoe import SamoeModel
from tracking import FIRST_TIMED_FRAME

MODULES = {"vision_encoder": "image encoder", "mask_decoder": "mask decoder", "memory_encoder": "memory encoder"}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Peaks:
    """What the device reaches: products of large matrices, operations a second; and large copies, bytes a second."""

    flops: float
    bandwidth: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, repeats: int = 5) -> "Peaks":
        side, length = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 28)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        source, target = (torch.zeros(length, dtype=torch.uint8, device=device) for _ in range(2))
        contenders = {"product": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
        products, copies = measure("peaks", contenders, repeats, device)
        return cls(2 * side**3 / min(products.seconds), 2 * length / min(copies.seconds))


@dataclass
class Part:
    """A part of a frame's work.

    `flops`: of its matrix products, convolutions and attention. `bytes`: of its parameters, inputs and outputs, each
    once. `frames`: that it works on at once; all else is of these together. `kernels`: of attention, that ran in it.
    """

    measurement: Measurement
    flops: int
    bytes: int
    frames: int
    kernels: tuple[str, ...]

    def row(self, peaks: Peaks) -> list[str]:
        """Cells of a table, all for one frame."""
        compute, traffic = self.floors(peaks)
        seconds = self.measurement.median / self.frames
        return [
            self.measurement.case,
            f"{1e3 * seconds:.3f}",
            f"{self.flops / self.frames / 1e9:.3f}",
            f"{self.bytes / self.frames / 2**20:.2f}",
            f"{1e3 * compute:.3f}",
            f"{1e3 * traffic:.3f}",
            f"{seconds / max(compute, traffic):.2f}",
            ", ".join(self.kernels),
        ]

    def floors(self, peaks: Peaks) -> tuple[float, float]:
        """Seconds for one frame's arithmetic, and for its data, at the device's peaks."""
        return self.flops / self.frames / peaks.flops, self.bytes / self.frames / peaks.bandwidth


HEADER = [
    "part", "median, ms", "GFLOP", "MB", "floor of arithmetic, ms", "floor of data, ms", "times floor", "attention"
]  # fmt: skip


def benchmark_parts(
    config: SamoeConfig, num_objects: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> list[Part]:
    """The encoder, memory attention, mask decoder and memory encoder on a frame whose memory is full."""
    torch.manual_seed(0)
    model = SamoeModel(config).to(device).eval()
    frames = torch.randn(FIRST_TIMED_FRAME, 3, config.image_size, config.image_size, device=device)
    points = torch.rand(num_objects, 2) * config.image_size
    with recorded_calls(model) as calls, autocast(device, dtype):
        list(TransformersTracker(model, config).track(frames, points))
    parts = []
    for name, (module, call) in calls.items():
        run = partial(_under, call, device, dtype)
        (measurement,) = measure(name, {"samoe_hf": run}, repeats, device)
        frames_at_once = len(call.args[0]) if name == "image encoder" else 1
        num_bytes = sum(_bytes(x) for x in (list(module.parameters()), call.args, call.keywords, run()))
        parts.append(Part(measurement, _count_flops(run), num_bytes, frames_at_once, _attention_kernels(run, device)))
    return parts


def benchmark_attention(
    config: SamoeConfig, num_objects: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> list[Measurement]:
    """Cross attention to a full memory by each kernel that the device has, beside the one that is chosen."""
    with torch.device("meta"):  # only its sizes are needed
        model = SamoeModel(config)
    tokens, hidden = math.prod(model.backbone_feature_sizes[-1]), model.hidden_dim
    keys = model.num_maskmem * tokens + config.max_object_pointers_in_encoder * hidden // model.mem_dim
    width = hidden // config.memory_attention_num_attention_heads
    heads = config.memory_attention_num_attention_heads
    query, key, value = (
        torch.randn(num_objects, heads, length, width, device=device, dtype=dtype) for length in (tokens, keys, keys)
    )
    contenders = {"as chosen": partial(F.scaled_dot_product_attention, query, key, value)}
    for name, backend in BACKENDS.items():
        run = partial(_with_backend, backend, query, key, value)
        if _is_available(run):
            contenders[name] = run
    with torch.inference_mode():
        return measure(f"cross attention, head of {width}", contenders, repeats, device)


def _with_backend(backend: SDPBackend, *tensors: Tensor) -> Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(*tensors)


def _is_available(run: Callable[[], Tensor]) -> bool:
    try:
        run()
    except RuntimeError as error:
        if not re.search("no (available|viable) ", str(error), re.IGNORECASE):
            raise
        return False
    return True


def _under(call: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    with torch.inference_mode(), autocast(device, dtype):
        return call()


@contextmanager
def recorded_calls(model: SamoeModel) -> Iterator[dict[str, tuple[nn.Module, partial]]]:
    """Name of each part -> its module, and its last call, to be repeated."""
    calls: dict[str, tuple[nn.Module, partial]] = {}

    def record(part: str, module: nn.Module) -> RemovableHandle:
        def keep(_, args: tuple, kwargs: dict) -> None:
            calls[part] = module, partial(module, *args, **kwargs)

        return module.register_forward_pre_hook(keep, with_kwargs=True)

    attend = model.attend_to_memory

    def attend_and_keep(attention: nn.Module, *args: Any) -> Tensor:
        calls["memory attention"] = attention, partial(attend, attention, *args)
        return attend(attention, *args)

    handles = [record(part, model.get_submodule(name)) for name, part in MODULES.items()]
    model.attend_to_memory = attend_and_keep
    try:
        yield calls
    finally:
        model.attend_to_memory = attend
        for handle in handles:
            handle.remove()


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        lengths = [length for length, stride in zip(value.shape, value.stride(), strict=True) if stride]
        return math.prod(lengths) * value.element_size()  # what broadcasts is there once
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _count_flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _attention_kernels(run: Callable[[], Any], device: torch.device) -> tuple[str, ...]:
    """Names of PyTorch's attention operations that run, and on a GPU of the kernels that these start."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        run()
    names = {event.key for event in profiler.key_averages()}
    operations = {name.removeprefix("aten::") for name in names if name.startswith("aten::_scaled_dot_product")}
    others = [name for name in names if not name.startswith("aten::")]
    kernels = {name.split("<")[0] for name in others if "flash" in name or "fmha" in name}
    return tuple(sorted(operations | kernels))
