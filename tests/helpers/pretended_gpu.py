"""A GPU that is pretended: its tensors say that they are on cuda:0, hold values of the CPU, and mix with no others.

It shows, where there is no GPU, that what runs together is on one device, and how often a GPU would be waited for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
# These read a value, or need one for the size of what they give.
WAITING = [aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default]
WAITING += [aten.repeat_interleave.Tensor, aten._unique2.default]
INDEXING = [aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default]
COPIES = [aten.copy_.default, aten._to_copy.default]


class PretendedTensor(Tensor):
    """A tensor of the CPU that says it is on the GPU."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        options = {"strides": inner.stride(), "dtype": inner.dtype, "device": GPU}
        tensor = Tensor._make_wrapper_subclass(cls, inner.size(), **options)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("used after the GPU was there")


class PretendedGPU(TorchDispatchMode):
    """While it is entered, what has tensors of the GPU is computed there. `waits`: what would have waited for it."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # one of others, which inference mode does not take apart
                return func.decompose(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        are_there = [isinstance(x, PretendedTensor) for x in tensors]
        target = kwargs.get("device")
        if func is aten._pin_memory.default:
            args[0].is_pinned_for_gpu = True
            return args[0]
        if func is aten.is_pinned.default:
            return False
        if func is aten._fused_sdp_choice.default and any(are_there):
            return 0  # the one in PyTorch's own operations
        if not any(are_there) and (target is None or target.type == "cpu"):
            return func(*args, **kwargs)
        if func not in COPIES + INDEXING and any(are_there):
            others = [x for x, is_there in zip(tensors, are_there, strict=True) if not is_there and x.dim()]
            assert not others, f"{func} of tensors of the GPU with {[tuple(x.shape) for x in others]} of the CPU"
        if self._waits(func, args, kwargs):
            self.waits.append(str(func))
        inner = [tree_map_only(PretendedTensor, lambda x: x.inner, given) for given in (args, kwargs)]
        if target is not None:
            inner[1]["device"] = torch.device("cpu")
        with torch.inference_mode(False), torch.no_grad():  # in which a view needs its base's count of changes
            result = func(*inner[0], **inner[1])
            on_gpu = tree_map_only(Tensor, PretendedTensor, result)
        if func._schema.name.split(".")[0].endswith("_") and isinstance(args[0], Tensor):
            return args[0]  # computed in place
        if target is not None and target.type == "cpu":
            return result
        return on_gpu

    @staticmethod
    def _waits(func: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
        if func in INDEXING:
            indices = [x for x in args[1] if x is not None]
            return any(x.dtype == torch.bool or not isinstance(x, PretendedTensor) for x in indices)
        if func not in COPIES:
            return func in WAITING
        ends = (isinstance(args[0], PretendedTensor), "device" not in kwargs or kwargs["device"].type == "cuda")
        if func is aten.copy_.default:
            ends = (isinstance(args[1], PretendedTensor), isinstance(args[0], PretendedTensor))
        is_prepared = kwargs.get("non_blocking") and getattr(args[0], "is_pinned_for_gpu", False)
        return ends[0] != ends[1] and not is_prepared


class _Values(TorchFunctionMode):
    """What PyTorch asks no operation for."""

    def __init__(self, gpu: PretendedGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.data_ptr) and isinstance(args[0], PretendedTensor):
            self.gpu.waits += ["tolist"] if func is Tensor.tolist else []
            return func(args[0].inner)
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended_gpu(model: nn.Module) -> Iterator[PretendedGPU]:
    """Puts a model on the GPU, for good, and opens it for what runs without gradients."""
    torch._C._ensureCUDADeviceGuardSet()  # as FakeTensorMode does
    torch._C._set_only_lift_cpu_tensors(True)
    for module in model.modules():
        places: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in places:
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else PretendedTensor(tensor.detach())
    try:
        with mock.patch.object(torch.cuda, "_lazy_init"), PretendedGPU() as gpu, _Values(gpu):
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
