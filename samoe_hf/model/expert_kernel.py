"""What experts add to a linear layer's output, in one kernel: routers, top k, gates, A, B and the addition.

PyTorch starts nine kernels for the same, and where few tokens are run, to start them is most of the time. It is written
in Triton, which PyTorch for GPUs brings, and is used for inference where it works. `TRITON_INTERPRET=1`, set before
Triton is imported, runs it on a CPU, slowly. Nothing here knows of SAM 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.utils import logging

from .expert_router import top_k_gates

kernel: Any = None
try:
    import triton
    from triton import language as tl
except ImportError:
    IS_INTERPRETED = False
else:

    @triton.jit(do_not_specialize=["num_tokens"])
    def _kernel(
        outputs,
        tokens,
        down,
        router_bias,
        up,
        num_tokens,
        scaling,
        LAYERS: tl.constexpr,
        INPUTS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        EXPERTS: tl.constexpr,
        RANK: tl.constexpr,
        PER_TOKEN: tl.constexpr,
        BLOCK_EXPERTS: tl.constexpr,
        BLOCK_RANK: tl.constexpr,
        BLOCK: tl.constexpr,
        PRECISION: tl.constexpr,
        IN_FLOAT32: tl.constexpr,
    ):
        """A block of tokens of one layer; the arguments are those of [`launch`]."""
        TYPE = tl.float32 if IN_FLOAT32 else outputs.dtype.element_ty
        layer = tl.program_id(1).to(tl.int64)
        rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        is_row = (rows < num_tokens)[:, None]
        # The experts, and the columns of all A, of which each expert has `BLOCK_RANK`; both are filled up.
        expert = tl.arange(0, BLOCK_EXPERTS)
        is_expert = (expert < EXPERTS)[None, :]
        column = tl.arange(0, BLOCK_EXPERTS * BLOCK_RANK)
        is_column = (column // BLOCK_RANK < EXPERTS) & (column % BLOCK_RANK < RANK)
        column = layer * EXPERTS * RANK + column // BLOCK_RANK * RANK + column % BLOCK_RANK
        routers = down + (layer * EXPERTS + expert)[None, :] * INPUTS
        down = down + (LAYERS * EXPERTS + column)[None, :] * INPUTS

        logits = tl.zeros((BLOCK, BLOCK_EXPERTS), tl.float32)
        low_rank = tl.zeros((BLOCK, BLOCK_EXPERTS * BLOCK_RANK), tl.float32)
        for start in range(0, INPUTS, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            mask = is_row & (channel < INPUTS)[None, :]
            x = tl.load(tokens + rows[:, None] * INPUTS + channel[None, :], mask=mask, other=0.0).to(TYPE)
            is_channel = (channel < INPUTS)[:, None]
            weights = tl.load(routers + channel[:, None], mask=is_channel & is_expert, other=0.0).to(TYPE)
            logits = tl.dot(x, weights, logits, input_precision=PRECISION)
            weights = tl.load(down + channel[:, None], mask=is_channel & is_column[None, :], other=0.0).to(TYPE)
            low_rank = tl.dot(x, weights, low_rank, input_precision=PRECISION)

        bias = tl.load(router_bias + (layer * EXPERTS + expert)[None, :], mask=is_expert, other=0.0)
        logits = tl.where(is_expert, logits + bias.to(tl.float32), float("-inf"))
        rest = logits
        for _ in range(PER_TOKEN):
            best = tl.argmax(rest, axis=1)
            rest = tl.where(expert[None, :] == best[:, None], float("-inf"), rest)
        # Those that were taken out. Of a logit of -inf the gate is 0 either way.
        gates = tl.where(rest != logits, tl.exp(logits - tl.max(logits, axis=1, keep_dims=True)), 0.0)
        gates = gates / tl.sum(gates, axis=1, keep_dims=True)
        gated = tl.reshape(low_rank, (BLOCK, BLOCK_EXPERTS, BLOCK_RANK)) * gates[:, :, None]
        gated = tl.reshape(gated, (BLOCK, BLOCK_EXPERTS * BLOCK_RANK)).to(TYPE)

        for start in range(0, OUTPUTS, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            is_channel = (channel < OUTPUTS)[None, :]
            mask = is_column[:, None] & is_channel
            weights = tl.load(up + column[:, None] * OUTPUTS + channel[None, :], mask=mask, other=0.0).to(TYPE)
            added = tl.dot(gated, weights, input_precision=PRECISION) * scaling
            places = outputs + (rows[:, None] * LAYERS + layer) * OUTPUTS + channel[None, :]
            before = tl.load(places, mask=is_row & is_channel, other=0.0).to(tl.float32)
            tl.store(places, (before + added).to(outputs.dtype.element_ty), mask=is_row & is_channel)

    kernel = _kernel
    # Then it runs as Python, on tensors of any device.
    IS_INTERPRETED = not isinstance(kernel, triton.JITFunction)

logger = logging.get_logger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens and channels of a block. A GPU multiplies no less than 16 experts, and experts x rank are held in registers.
BLOCK, MIN_EXPERTS, MAX_COLUMNS = 32, 16, 256
# Of each device, type and size: whether the kernel agreed with PyTorch.
_agrees: dict[tuple, bool] = {}
Through = Callable[[Tensor], Tensor]


class JoinedExperts(NamedTuple):
    """Experts of n linear layers of one input, alike in all sizes.

    `down` (n x experts x (1 + rank), in_features): all routers' weights, then all A. `router_bias` (n x experts, 1).
    `up` (n, experts x rank, out_features): all B, transposed. `per_token`: experts kept for each token. `scaling`: of
    the experts' part.
    """

    down: Tensor
    router_bias: Tensor
    up: Tensor
    per_token: int
    scaling: float

    def to(self, dtype: torch.dtype) -> "JoinedExperts":
        """The same with tensors of a type."""
        down, router_bias, up = (x.to(dtype) for x in self[:3])
        return self._replace(down=down, router_bias=router_bias, up=up)


def add_by_kernel(outputs: Tensor, tokens: Tensor, experts: JoinedExperts) -> bool:
    """Adds experts' part to what n linear layers put out, in place; returns whether the kernel can be used here.

    That is for inference on a GPU, uncompiled, with plain tensors of one type. Before a device, type and size are
    first used, the kernel is compared with PyTorch on random numbers; if it fails or differs, a warning says so, and it
    is not used for them.

    Products are summed in float32, where logits and gates stay. So in half precision experts are chosen as in float32
    with the same weights, and not by rounded logits. Of experts with equal logits the first is taken; `torch.topk` does
    not say which. `outputs` are (n, tokens, out_features), `tokens` (tokens, in_features).
    """
    weights, up = experts[:3], experts.up
    if kernel is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if not (outputs.is_cuda or IS_INTERPRETED) or outputs.dtype not in DTYPES:
        return False
    plain = all(type(x) in (Tensor, nn.Parameter) for x in (outputs, tokens, *weights))
    if not plain or any((x.dtype, x.device) != (up.dtype, up.device) for x in (outputs, tokens, *weights)):
        return False
    if not (outputs.transpose(0, 1).is_contiguous() and all(x.is_contiguous() for x in weights)):
        return False
    num_experts = len(experts.router_bias) // len(up)
    if _filled(num_experts) * _filled(up.shape[1] // num_experts, 1) > MAX_COLUMNS:
        return False
    key = (up.device, up.dtype, *up.shape, num_experts, tokens.shape[1], experts.per_token)
    if key not in _agrees:
        if up.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        reason = "it differs from PyTorch"
        try:
            with torch.autocast(up.device.type, enabled=False):
                _agrees[key] = _compare(experts)
        except Exception as error:  # of Triton's compilers, whatever they raise
            _agrees[key], reason = False, f"{type(error).__name__}: {error}"
        if not _agrees[key]:
            logger.warning(f"No kernel for experts is used for {up.dtype} on {up.device}, which is slower: {reason}")
    if _agrees[key]:
        launch(outputs, tokens.contiguous(), experts)
    return _agrees[key]


def add_mixtures(
    outputs: Tensor, tokens: Tensor, experts: JoinedExperts, dropout: Through | None = None, show: Through | None = None
) -> Tensor:
    """The outputs (tokens, n x out_features) with experts' part, in the fastest way there is; they may be changed in
    place."""
    by_layer = outputs.unflatten(1, (len(experts.up), -1)).transpose(0, 1)
    if dropout is None and show is None and not torch.compiler.is_compiling():
        if add_by_kernel(by_layer, tokens, experts):
            return outputs
        if torch.is_grad_enabled():
            return AddExperts.apply(outputs, tokens, *experts)
    return by_pytorch(by_layer, tokens, experts, dropout, show).transpose(0, 1).flatten(1)


def by_pytorch(
    outputs: Tensor, tokens: Tensor, experts: JoinedExperts, dropout: Through | None = None, show: Through | None = None
) -> Tensor:
    """The outputs with experts' part, by PyTorch; see [`add_by_kernel`]. They may be changed in place.

    `dropout` is of what each router reads, and between A and B; the logits (n, experts, tokens) pass through `show`.
    """
    gates, low_rank = _route(tokens, experts, dropout, show)
    gated = (low_rank * gates.unsqueeze(2)).flatten(1, 2)
    # All experts in one product: nothing of size experts x tokens x out_features is ever formed.
    add = outputs.baddbmm if torch.is_grad_enabled() else outputs.baddbmm_
    return add(gated.mT, experts.up, alpha=experts.scaling)


def _route(
    tokens: Tensor, experts: JoinedExperts, dropout: Through | None = None, show: Through | None = None
) -> tuple[Tensor, Tensor]:
    """Gates (n, experts, tokens), and what all A put out (n, experts, rank, tokens)."""
    down, router_bias, by_layer = experts.down, experts.router_bias, (len(experts.up), -1)
    # Tokens lie along the last dimension, since they are many, and operations along a short last one are slow.
    if dropout is None:
        logits, low_rank = (down @ tokens.mT).tensor_split([len(router_bias)])
        logits = logits.unflatten(0, by_layer)
    else:
        routers, A = down.tensor_split([len(router_bias)])
        logits = routers.unflatten(0, by_layer) @ dropout(tokens.mT.expand(len(experts.up), -1, -1))
        low_rank = dropout(A @ tokens.mT)
    logits = logits + router_bias.unflatten(0, by_layer)
    gates = top_k_gates(logits if show is None else show(logits), experts.per_token, dim=1)
    return gates, low_rank.unflatten(0, (*gates.shape[:2], -1))


class AddExperts(torch.autograd.Function):
    """What [`by_pytorch`] does to outputs (tokens, n x out_features), in place, with gradients that take half as many
    kernels as PyTorch's own."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, *inputs: Any) -> Tensor:
        tokens, experts = inputs[0], JoinedExperts(*inputs[1:])
        down, up, ctx.scaling = experts.down, experts.up, experts.scaling
        gates, low_rank = _route(tokens, experts)
        gated = (low_rank * gates.unsqueeze(2)).flatten(1, 2)
        outputs.unflatten(1, (len(up), -1)).transpose(0, 1).baddbmm_(gated.mT, up, alpha=ctx.scaling)
        ctx.mark_dirty(outputs)
        ctx.save_for_backward(tokens, down, up, gates, low_rank, gated)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        tokens, down, up, gates, low_rank, gated = ctx.saved_tensors
        _, needs_tokens, needs_down, _, needs_up, *_ = ctx.needs_input_grad
        by_layer = gradient.unflatten(1, (len(up), -1)).transpose(0, 1)
        of_up = torch.baddbmm(up, gated, by_layer, beta=0, alpha=ctx.scaling) if needs_up else None
        of_gated = torch.baddbmm(gated, up, by_layer.mT, beta=0, alpha=ctx.scaling).view_as(low_rank)
        of_gates = (of_gated * low_rank).sum(dim=2)
        of_all = down.new_empty(len(down), len(tokens))
        of_logits, of_low_rank = of_all.tensor_split([gates[..., 0].numel()])
        torch.ops.aten._softmax_backward_data(of_gates, gates, 1, gates.dtype, grad_input=of_logits.view_as(gates))
        torch.mul(of_gated, gates.unsqueeze(2), out=of_low_rank.view_as(low_rank))
        of_tokens = of_all.mT @ down if needs_tokens else None
        of_down = of_all @ tokens if needs_down else None
        return gradient, of_tokens, of_down, of_logits.sum(dim=1, keepdim=True), of_up, None, None


def launch(outputs: Tensor, tokens: Tensor, experts: JoinedExperts) -> None:
    """Runs the kernel; see [`add_by_kernel`]."""
    num_layers, num_tokens, num_outputs = outputs.shape
    num_experts = len(experts.router_bias) // num_layers
    rank = experts.up.shape[1] // num_experts
    sizes = num_layers, tokens.shape[1], num_outputs, num_experts, rank, experts.per_token
    blocks = _filled(num_experts), _filled(rank, 1), BLOCK
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    if num_tokens == 0:
        return
    with torch.cuda.device_of(outputs):
        kernel[-(-num_tokens // BLOCK), num_layers](
            *(outputs, tokens, *experts[:3], num_tokens, experts.scaling),
            *(*sizes, *blocks, precision, IS_INTERPRETED),  # the interpreter's products of bfloat16 are wrong
            num_stages=2,
        )


def _filled(count: int, least: int = MIN_EXPERTS) -> int:
    """The next power of 2."""
    return 1 << (max(count, least) - 1).bit_length()


def _compare(experts: JoinedExperts) -> bool:
    """Whether the kernel and PyTorch agree on random numbers in place of all that it reads."""
    down, router_bias, up = experts[:3]
    generator = torch.Generator(up.device).manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=up.device) * std).to(up.dtype)

    outputs = draw(100, len(up), up.shape[2]).transpose(0, 1)
    before = outputs.float().clone()
    tokens, down = draw(100, down.shape[1]), draw(*down.shape, std=down.shape[1] ** -0.5)
    experts = experts._replace(down=down, router_bias=draw(*router_bias.shape), up=draw(*up.shape))
    expected = by_pytorch(before, tokens.float(), experts.to(torch.float32))
    launch(outputs, tokens, experts)
    # Rounding may choose another expert where logits are close.
    error = (outputs.float() - expected).abs().amax(dim=2)
    return bool((error < 0.02 * expected.abs().max()).float().mean() > 0.95)
