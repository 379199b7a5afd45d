"""How many kernels a tracked frame takes, by part and by kind, beside `transformers`' and `sam2`'s.

python scripts/benchmarks/count_kernels.py --objects 1 4 16 --dtypes float32 bfloat16
python scripts/benchmarks/count_kernels.py --model model_micro --contenders "ten experts" transformers sam2
python scripts/benchmarks/count_kernels.py --model model_base_plus --image-size 256 --bytes --objects 64

Any machine counts them: what starts a kernel on a GPU is an operation of a profile that has no others within it. Views
and empty tensors start none. What a CPU does within a matrix product is part of it; but a product that is added to more
than one row of a bias copies that first, also on a GPU. The memory is full, and the frame is encoded alone, though
propagation encodes some together. bfloat16 is that of the weights; of `sam2`, which has no other, by autocast. With
`--bytes` it counts what the operations of ours read and write for each further object, from the memory attention to
the memory encoder.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from measure import at_least, autocast
from peers import Sam2Tracker, TransformersTracker, base_of, sam2_of
from samoe_hf import SamoeConfig, SamoeModel, small_base
from samoe_hf.data.registry import read_yaml
from samoe_hf.evaluation.report import format_table
from samoe_hf.model.frame_step import encode_frames, frame_step, memory_limits
from samoe_hf.model.kept import keep_between
from samoe_hf.model.memory_bank import FrameMemory, MemoryBank
from samoe_hf.model.memory_selection import select_memories

# The last of so many frames is counted. It reads all memories and object pointers that a frame can.
NUM_FRAMES = 18
PARTS = {
    "image encoder": ("vision_encoder", "image_encoder"),
    "memory attention": ("memory_attention",),
    "decoder": ("prompt_encoder", "mask_decoder", "sam_prompt_encoder", "sam_mask_decoder"),
    "memory encoder": ("memory_encoder",),
}
PRODUCTS = ("addmm", "addmm_", "mm", "bmm", "baddbmm", "baddbmm_", "convolution", "scaled_dot_product_attention")
KINDS = {"copy": ("copy_", "cat", "fill_", "zero_", "index", "index_select"), "norm": ("native_layer_norm",)}
# Beside views, which their schemas tell.
NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "resize_", "resolve_conj", "resolve_neg", "dropout")
NOTHING += ("result_type", "promote_types", "item", "_local_scalar_dense", "type_as", "detach_", "_unsafe_view")
ONE = "one"
CONTENDERS = ("ten experts", "one-expert domain", "no experts", "transformers", "sam2")
CPU = torch.device("cpu")


def count_kernels(run: Callable[[], object], model: nn.Module) -> Counter[tuple[str, str]]:
    """Kernels that a run starts, by part of a model and by kind."""
    open_parts: list[record_function] = []

    def enter(part: str, *_: object) -> None:
        open_parts.append(record_function(f"part {part}"))
        open_parts[-1].__enter__()

    def leave(*_: object) -> None:
        open_parts.pop().__exit__(None, None, None)

    handles = []
    for part, names in PARTS.items():
        for module in (module for name in names if (module := getattr(model, name, None)) is not None):
            handles += [module.register_forward_pre_hook(partial(enter, part)), module.register_forward_hook(leave)]
    try:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            run()
    finally:
        for handle in handles:
            handle.remove()
    events = profiler.events() or []
    counts: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.cpu_parent is None:
            _count(event, "rest", counts)
    return counts


def _count(event: FunctionEvent, part: str, counts: Counter[tuple[str, str]]) -> bool:
    """Counts the kernels of an event; returns whether there are any."""
    if event.name.startswith("part "):
        part = event.name.removeprefix("part ")
    name = event.name.removeprefix("aten::")
    if name in PRODUCTS:
        counts[part, "product"] += 1
        counts[part, "copy"] += name in ("addmm", "baddbmm") and len(event.input_shapes[0]) > 1
        return True
    found = [_count(child, part, counts) for child in event.cpu_children]
    if any(found) and name not in KINDS["norm"]:  # which may copy its input first
        return True
    if not event.name.startswith("aten::") or name in NOTHING or _is_view(name):
        return False
    counts[part, next((kind for kind, names in KINDS.items() if name in names), "other")] += 1
    return True


@lru_cache
def _is_view(name: str) -> bool:
    """Whether an operation returns its input, or a view of it, unchanged."""
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    return any(x.alias_info is not None and not x.alias_info.is_write for schema in schemas for x in schema.returns)


def count_frame(config: SamoeConfig, contender: str, num_objects: int, dtype: torch.dtype) -> Counter[tuple[str, str]]:
    """Kernels of a frame of objects that are given by a point each on the first; see [`count_kernels`].

    Args:
        config: of the base model.
        contender: one of [`CONTENDERS`].
    """
    torch.manual_seed(0)
    expert = {"num_experts": 1, "num_experts_per_tok": 1, "lora_rank": 4, "lora_alpha": 4.0}
    domain = {"name": ONE, "expert_modules": config.expert_modules, "lora_dropout": 0.0, **expert}
    several = {"num_experts": 10, "num_experts_per_tok": 2, "domains": None}
    settings = several if contender == CONTENDERS[0] else {"domains": [domain]}
    model = SamoeModel(SamoeConfig(**{**config.to_dict(), **settings})).eval()
    frames = torch.randn(NUM_FRAMES, 3, config.image_size, config.image_size)
    points = torch.rand(num_objects, 2) * config.image_size
    if contender == "sam2":
        model = sam2_of(model)
        tracked = Sam2Tracker(model).track(frames, points)
        with torch.inference_mode(), autocast(CPU, dtype):
            for _ in range(NUM_FRAMES - 1):
                next(tracked)
            return count_kernels(lambda: next(tracked), model)
    tracker = TransformersTracker(base_of(model) if contender == "transformers" else model, model.config)
    tracker.model.to(dtype)
    session = tracker.session(frames.to(dtype), points)
    session.domain = ONE if contender == "one-expert domain" else None
    tracked = tracker.model.propagate_in_video_iterator(session, start_frame_idx=0)
    with torch.inference_mode():
        for _ in range(NUM_FRAMES - 1):
            next(tracked)
        return count_kernels(lambda: next(tracked), tracker.model)


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that operations read and write, by part of a model and by kind, and how many they are."""

    def __init__(self):
        super().__init__()
        self.part, self.bytes, self.kernels = "rest", Counter[tuple[str, str]](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output, name = func(*args, **(kwargs or {})), func.name().removeprefix("aten::").partition(".")[0]
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if not is_view and name not in NOTHING:
            tensors = {id(x): x for x in tree_leaves((args, kwargs, output)) if isinstance(x, torch.Tensor)}
            moved = (min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in tensors.values())
            kinds = {"product": PRODUCTS, "attention": ("_scaled_dot_product_flash_attention_for_cpu",), **KINDS}
            kinds |= {"cast": ("_to_copy",), "experts": ("topk", "scatter_", "_softmax", "zeros_like")}
            self.bytes[self.part, next((kind for kind in kinds if name in kinds[kind]), "other")] += sum(moved)
            self.kernels += 1
        return output


@torch.no_grad()
def count_bytes(config: SamoeConfig, num_objects: int, dtype: torch.dtype) -> ByteCounter:
    """What a frame of objects with full memory reads and writes, but for its image encoder."""
    torch.manual_seed(0)
    model, counter = SamoeModel(config).eval().to(dtype), ByteCounter()
    image = encode_frames(model, torch.randn(1, 3, config.image_size, config.image_size, dtype=dtype))
    banks, tokens = [MemoryBank() for _ in range(num_objects)], image.coarse.shape[-2:].numel()
    for t in range(NUM_FRAMES - 1):
        features = torch.randn(num_objects, tokens, model.mem_dim, dtype=torch.bfloat16)
        memory = FrameMemory(torch.randn(num_objects, model.hidden_dim, dtype=dtype), features)
        for index, bank in enumerate(banks):
            bank.write(t, memory.row(index), conditioning=t == 0)
    limits = memory_limits(model, num_frames=None)
    selections = [select_memories("recent", bank, NUM_FRAMES - 1, limits) for bank in banks]
    for part, (name, *_) in list(PARTS.items())[1:]:
        module = model.get_submodule("mask_decoder" if part == "decoder" else name)
        module.register_forward_pre_hook(lambda *_, part=part: setattr(counter, "part", part))
        module.register_forward_hook(lambda *_: setattr(counter, "part", "rest"))

    def steps() -> Iterator[None]:
        for watch in (nullcontext(), counter):  # what is kept is computed first
            with watch:
                frame_step(model, image, None, banks, selections, num_objects=num_objects)
            yield

    list(keep_between(steps()))
    return counter


def bytes_table(config: SamoeConfig, num_objects: Sequence[int], dtypes: Sequence[str]) -> str:
    """Kernels of a frame, and MB for each object beyond the first, by part and kind."""
    kinds = ("product", "attention", *KINDS, "cast", "experts", "other")
    rows = []
    for dtype in dtypes:
        one = count_bytes(config, 1, getattr(torch, dtype))
        for count in num_objects:
            found = count_bytes(config, count, getattr(torch, dtype))
            for part in (*list(PARTS)[1:], "rest"):
                cells = [(found.bytes[part, kind] - one.bytes[part, kind]) / (count - 1) / 1e6 for kind in kinds]
                rows.append([dtype, str(count), str(found.kernels), part, *(f"{x:.2f}" for x in (sum(cells), *cells))])
    return format_table(["type", "objects", "kernels", "part", "MB an object", *kinds], rows, markdown=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a YAML, or one of the package's sizes; by default the small base")
    parser.add_argument("--objects", type=at_least(1), nargs="+", default=[1, 4, 16], help="(%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--contenders", nargs="+", default=CONTENDERS[:-1], choices=CONTENDERS, help="(all that can be the small base)"
    )
    parser.add_argument("--bytes", action="store_true", help="count bytes instead; of at least 2 objects")
    parser.add_argument("--image-size", type=at_least(32), help="(that of the model)")
    parsed = parser.parse_args(arguments)
    config = SamoeConfig(**read_yaml(parsed.model)) if parsed.model else SamoeConfig.from_pretrained(small_base())
    if parsed.image_size:
        config.resize(parsed.image_size)
    if parsed.bytes:
        config = SamoeConfig(**{**config.to_dict(), "num_experts": 10, "num_experts_per_tok": 2})
        print(bytes_table(config, [count for count in parsed.objects if count > 1], parsed.dtypes))
        return
    kinds = ("product", *KINDS, "other")
    rows = []
    for dtype in parsed.dtypes:
        for count in parsed.objects:
            for contender in parsed.contenders:
                counts = count_frame(config, contender, count, getattr(torch, dtype))
                parts = [sum(counts[part, kind] for kind in kinds) for part in (*PARTS, "rest")]
                of_kinds = [sum(counts[part, kind] for part in (*PARTS, "rest")) for kind in kinds]
                rows.append([dtype, str(count), contender, *map(str, (counts.total(), *parts, *of_kinds))])
    print(format_table(["type", "objects", "", "all", *PARTS, "rest", *kinds], rows, markdown=True))


if __name__ == "__main__":
    main()
