"""The router: which experts a token gets, how that is watched and forced, and the load-balancing loss.

A router's logits of a token become gates: the softmax over its top k logits, and zero for all other experts. Nothing
here knows of SAM 2.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .batch_rows import BatchRows, batch_rows
from .errors import InputError
from .graphs import uncompiled


class Router(nn.Module):
    """The logits of the experts, a linear function: (..., in_features) -> (..., num_experts).

    It is no `nn.Linear`, so that adapters for all linear layers of a model leave it alone. A mixture computes with its
    weight and bias and does not call it, so its hooks are not run; those of [`RouterLogits`], `router_logits`, are.
    """

    def __init__(
        self, in_features: int, num_experts: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws weight and bias as `nn.Linear` does."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states, self.weight, self.bias)


class RouterLogits(nn.Identity):
    """Passes a router's logits on. Its hooks see them, and may change them."""

    def is_watched(self) -> bool:
        """Whether it has hooks, or had some in the forward pass that is computed again, see [`recomputable`]."""
        if not torch.compiler.is_compiling() and _runs_hooks.get():
            return True
        return is_hooked(self)


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks of its own are run with a module."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def top_k_gates(router_logits: Tensor, num_experts_per_tok: int, dim: int = -1) -> Tensor:
    """Softmax over each token's `num_experts_per_tok` largest logits, zero elsewhere; the experts lie along `dim`."""
    if router_logits.requires_grad:
        # An operation more than below, and two less backward.
        top_experts = router_logits.detach().topk(num_experts_per_tok, dim=dim, sorted=False).indices
        left_out = torch.full_like(router_logits, -torch.inf, requires_grad=False).scatter_(dim, top_experts, 0.0)
        return (left_out + router_logits).softmax(dim=dim).to(router_logits.dtype)
    top_logits, top_experts = router_logits.topk(num_experts_per_tok, dim=dim, sorted=False)
    # A GPU's autocast gives a softmax in float32.
    weights = top_logits.softmax(dim=dim).to(router_logits.dtype)
    return torch.zeros_like(router_logits).scatter_(dim, top_experts, weights)


def router_outputs(model: nn.Module) -> Iterator[tuple[str, RouterLogits]]:
    """What the logits of each router of `model` pass through, with the name of the mixture that the router is of."""
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, RouterLogits))
    return ((name.rpartition(".")[0], module) for name, module in modules)


_runs_hooks: ContextVar[bool] = ContextVar("runs_hooks", default=False)


@contextmanager
def open_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """While the context is open, hooks run; then they are removed.

    Compiled functions run uncompiled meanwhile, since compiled code does not run hooks that were registered after it.
    """
    handles = list(handles)
    token = _runs_hooks.set(True)
    try:
        with uncompiled():
            yield
    finally:
        _runs_hooks.reset(token)
        for handle in handles:
            handle.remove()


def recomputable(function: Callable) -> Callable:
    """`function` for gradient checkpointing: if hooks run now, later calls compute in the same way, without them."""
    return open_hooks(())(function) if _runs_hooks.get() else function


class RouterCall(NamedTuple):
    """What a router put out in one call: logits (rows, ..., experts), and what the rows were."""

    logits: Tensor
    rows: BatchRows

    def own_logits(self) -> Tensor:
        """Logits (tokens, experts) of the rows' own tokens."""
        return self.logits.flatten(0, -2) if self.rows.is_own is None else self.logits[self.rows.is_own]


@contextmanager
def record_router_logits(model: nn.Module) -> Iterator[dict[str, list[RouterCall]]]:
    """Collects, while the context is open, what each router puts out: module name -> its calls, in order."""
    records: dict[str, list[RouterCall]] = {name: [] for name, _ in router_outputs(model)}

    def record(name: str) -> Callable:
        return lambda _, __, logits: records[name].append(RouterCall(logits, batch_rows()))

    with open_hooks(output.register_forward_hook(record(name)) for name, output in router_outputs(model)):
        yield records


def load_balancing_loss(router_logits: Mapping[str, Tensor], num_experts_per_tok: int | Mapping[str, int]) -> Tensor:
    """The auxiliary loss of Switch Transformers (arXiv:2101.03961, eq. 4 to 6) in Mixtral's form for top k, a scalar.

    For each layer `experts * sum_e f_e P_e`, where `f_e` is the share of tokens that choose expert e and `P_e` the mean
    of its probability over all experts, through which gradients flow; averaged over the layers. It is
    `num_experts_per_tok` when tokens are spread evenly, and grows to the number of experts as they gather on few.

    Args:
        router_logits: name of each layer -> (tokens, experts).
        num_experts_per_tok: of all layers, or the name of each -> its own.
    """
    if not router_logits:
        raise InputError("`router_logits` is empty: no layer with experts was run.")
    losses = []
    for name, logits in router_logits.items():
        logits = logits.float()
        k = num_experts_per_tok if isinstance(num_experts_per_tok, int) else num_experts_per_tok[name]
        chosen = logits.topk(k, dim=-1).indices
        frequency = torch.zeros_like(logits).scatter(-1, chosen, 1.0).mean(dim=0)
        losses.append(logits.shape[-1] * (frequency * logits.softmax(dim=-1).mean(dim=0)).sum())
    return torch.stack(losses).mean()
