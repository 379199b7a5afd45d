"""The layer with experts beside the plain linear layer and beside SAM2-MoE's way of computing it.

python scripts/benchmarks/experts.py --model model_tiny
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from measure import Measurement, at_least, benchmark_parser, measure, prepare, to_markdown, write_results
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.expert_kernel import JoinedExperts, add_by_kernel, by_pytorch
from samoe_hf.model.expert_layer import ExpertLinear, expert_modules
from samoe_hf.model.expert_router import top_k_gates
from samoe_hf.model.modeling_samoe import SamoeModel


def dense_forward(layer: ExpertLinear, hidden_states: Tensor) -> Tensor:
    """SAM2-MoE's way: every expert's whole output for every token, stacked and weighted by the gates."""
    gates = top_k_gates(layer.router(hidden_states), layer.num_experts_per_tok)
    outputs = [
        layer.scaling * F.linear(F.linear(hidden_states, layer.lora_A[e]), layer.lora_B[e])
        for e in range(layer.num_experts)
    ]
    experts = (torch.stack(outputs, dim=-2) * gates.unsqueeze(-1)).sum(dim=-2)
    return F.linear(hidden_states, layer.weight, layer.bias) + experts


def benchmark_layer(
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int = 4096,
    width: int = 256,
    num_experts: int = 10,
    num_experts_per_tok: int = 2,
    lora_rank: int = 4,
) -> list[Measurement]:
    """One layer: forward without gradients, and forward and backward to the experts.

    Raises:
        AssertionError: if the contenders' outputs differ.
    """
    settings = {"num_experts_per_tok": num_experts_per_tok, "lora_rank": lora_rank, "lora_alpha": 1.0}
    layer = ExpertLinear(width, width, num_experts=num_experts, **settings, device=device, dtype=dtype)
    nn.init.normal_(layer.lora_B, std=0.1)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    inputs = torch.randn(1, tokens, width, device=device, dtype=dtype)
    torch.testing.assert_close(layer(inputs), dense_forward(layer, inputs), rtol=1e-2, atol=1e-2)

    # Inputs of a layer in the middle of a model need gradients, and so the plain layer has a backward pass too.
    inputs_with_gradient = inputs.clone().requires_grad_()
    gradient = torch.randn(1, tokens, width, device=device, dtype=dtype)
    forwards: dict[str, Callable[[Tensor], Tensor]] = {
        "plain linear": lambda x: F.linear(x, layer.weight, layer.bias),
        "samoe_hf": layer,
        "dense experts": lambda x: dense_forward(layer, x),
    }

    def infer(forward: Callable[[Tensor], Tensor]) -> None:
        layer.eval()
        with torch.inference_mode():
            forward(inputs)

    def learn(forward: Callable[[Tensor], Tensor]) -> None:
        layer.train()
        forward(inputs_with_gradient).backward(gradient)

    results = []
    for case, step in (("forward", infer), ("forward and backward", learn)):
        contenders = {name: (lambda step=step, f=forward: step(f)) for name, forward in forwards.items()}
        results += measure(case, contenders, repeats, device, memory=True)
    return results


def benchmark_kernel(repeats: int, device: torch.device, dtype: torch.dtype, tokens: int = 4096) -> list[Measurement]:
    """Three layers of one input, as a propagated video runs them: with the kernel for experts, and by PyTorch.

    Raises:
        AssertionError: if the kernel does not run here, or its output differs.
    """
    layers, width, experts, rank = 3, 256, 10, 4
    shapes = {
        "inputs": (tokens, width),
        "weight": (layers * width, width),
        "down": (layers * experts * (1 + rank), width),
    }
    shapes |= {"router_bias": (layers * experts, 1), "up": (layers, experts * rank, width)}
    x = {name: torch.randn(shape, device=device, dtype=dtype) * width**-0.5 for name, shape in shapes.items()}
    joined = JoinedExperts(x["down"], x["router_bias"], x["up"], per_token=2, scaling=1.0)

    def plain() -> Tensor:
        return F.linear(x["inputs"], x["weight"]).unflatten(1, (layers, width)).transpose(0, 1)

    def with_kernel() -> Tensor:
        outputs = plain()
        assert add_by_kernel(outputs, x["inputs"], joined), "the kernel for experts does not run here"
        return outputs

    contenders = {
        "plain linear": plain,
        "kernel": with_kernel,
        "PyTorch": lambda: by_pytorch(plain(), x["inputs"], joined),
    }
    with torch.inference_mode():
        exact = by_pytorch(plain().float().clone(), x["inputs"].float(), joined.to(torch.float32))
        distance = (with_kernel() - exact).abs().amax(dim=2)
        # Half precision may choose another expert where logits are close.
        assert (distance < 0.02 * exact.abs().max()).float().mean() > 0.99, "the kernel differs from PyTorch"
        return measure(f"three layers, {tokens} tokens", contenders, repeats, device, memory=True)


def benchmark_memory_attention(
    config: SamoeConfig, repeats: int, device: torch.device, dtype: torch.dtype
) -> list[Measurement]:
    """The whole memory attention over a full memory, with its experts and without."""
    model = SamoeModel(config).to(device, dtype).eval()
    without = SamoeModel(config).to(device, dtype).eval()
    for name, module in list(expert_modules(without)):
        parent, _, child = name.rpartition(".")
        plain = nn.Linear(module.in_features, module.out_features, device=device, dtype=dtype)
        setattr(without.get_submodule(parent), child, plain)
    size, hidden, channels = model.backbone_feature_sizes[-1], model.hidden_dim, model.mem_dim
    tokens, pointers = size[0] * size[1], 16 * hidden // channels
    image = torch.randn(1, tokens, hidden, device=device, dtype=dtype)
    memory = torch.randn(1, model.num_maskmem * tokens + pointers, channels, device=device, dtype=dtype)
    attention = model.memory_attention
    rotation = attention.rotary_emb.of_memories(
        lambda _: attention.position_ids, (1,) * model.num_maskmem, pointers, model.device
    )

    def run(model: SamoeModel) -> None:
        with torch.inference_mode():
            model.memory_attention(image, image, memory, memory, rotation)

    contenders = {"plain linear": lambda: run(without), "samoe_hf": lambda: run(model)}
    return measure("memory attention", contenders, repeats, device, memory=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--tokens", type=at_least(1), default=4096, help="(%(default)s)")
    parser.add_argument("--width", type=at_least(1), default=256, help="of the layer (%(default)s)")
    parser.add_argument("--num-experts", type=at_least(1), default=10, help="(%(default)s)")
    parsed = parser.parse_args(arguments)
    config, dtype = prepare(parsed)
    shape = {"tokens": parsed.tokens, "width": parsed.width, "num_experts": parsed.num_experts}
    measurements = benchmark_layer(parsed.repeats, parsed.device, dtype, **shape)
    if parsed.device.type == "cuda":
        measurements += benchmark_kernel(parsed.repeats, parsed.device, dtype, parsed.tokens)
    measurements += benchmark_memory_attention(config, parsed.repeats, parsed.device, dtype)
    title = f"Experts: {parsed.tokens} tokens, {parsed.width} wide, {parsed.num_experts} experts"
    table = to_markdown(measurements, "plain linear")
    write_results(parsed.output, "experts", title, measurements, table, parsed.device)


if __name__ == "__main__":
    main()
