"""The expert layer against the sum it stands for, its routing, and the load-balancing loss."""

import math

import pytest
import torch
from torch import nn

from samoe_hf.analysis.routing import route_all_to
from samoe_hf.model.expert_layer import ExpertLinear, add_experts, is_expert_parameter, matching_linear_names
from samoe_hf.model.expert_router import load_balancing_loss, record_router_logits, top_k_gates

SETTINGS = {"num_experts": 5, "num_experts_per_tok": 2, "lora_rank": 3, "lora_alpha": 6.0, "lora_dropout": 0.0}


def random_layer(dtype: torch.dtype = torch.float64, **changes) -> ExpertLinear:
    layer = ExpertLinear(8, 6, dtype=dtype, **{**SETTINGS, **changes})
    nn.init.normal_(layer.lora_B)
    return layer


def sum_over_experts(layer: ExpertLinear, x: torch.Tensor) -> torch.Tensor:
    """The formula as SAM2-MoE writes it, expert by expert."""
    gates = top_k_gates(layer.router(x), layer.num_experts_per_tok)
    out = nn.functional.linear(x, layer.weight, layer.bias)
    for e in range(layer.num_experts):
        out = out + gates[..., e : e + 1] * layer.scaling * (x @ layer.lora_A[e].T @ layer.lora_B[e].T)
    return out


@pytest.mark.parametrize("k", [1, 2, 5])
def test_forward_and_gradients_equal_the_sum_over_experts(k):
    torch.manual_seed(0)
    layer, x = random_layer(num_experts_per_tok=k), torch.randn(2, 7, 8, dtype=torch.float64)
    out, expected = layer(x), sum_over_experts(layer, x)
    torch.testing.assert_close(out, expected)
    target = torch.randn_like(out)
    gradients = torch.autograd.grad((out * target).sum(), list(layer.parameters()))
    for ours, theirs in zip(
        gradients, torch.autograd.grad((expected * target).sum(), list(layer.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_dropout_is_on_what_the_router_reads_and_between_A_and_B(monkeypatch):
    layer, x = random_layer(lora_dropout=0.1), torch.randn(2, 7, 8, dtype=torch.float64)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, values: values * 0.5)
    out = layer(x)
    with torch.no_grad():
        layer.router.weight *= 0.5
        layer.lora_A *= 0.5
    torch.testing.assert_close(out, sum_over_experts(layer, x))
    torch.testing.assert_close(layer.eval()(x), out)


def test_new_experts_have_no_effect_and_share_the_base():
    linear = nn.Linear(8, 6)
    layer = ExpertLinear.from_linear(linear, **SETTINGS)
    x = torch.randn(4, 8)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(8) and layer.lora_A.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_products(dtype):
    torch.manual_seed(0)
    layer, x = random_layer(torch.float32).eval(), torch.randn(64, 8)
    with torch.inference_mode():
        exact = layer(x)
        with torch.autocast("cpu", dtype):
            rounded = layer(x)
        torch.testing.assert_close(layer(x), exact, rtol=0, atol=0)
    assert rounded.dtype == dtype
    # Where two experts' logits are close, rounding may choose another one.
    assert ((rounded - exact).abs() < 0.05 * exact.abs().max()).float().mean() > 0.95


def tree() -> nn.Module:
    return nn.ModuleDict(
        {"attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)}), "q_proj_norm": nn.LayerNorm(4)}
    )


def test_modules_are_matched_as_peft_matches_them():
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    for patterns in (["q_proj"], ["attn.o_proj", "q_proj"]):
        names = [name for name, module in tree().named_modules() if isinstance(module, nn.Linear)]
        config = LoraConfig(target_modules=patterns)
        expected = [name for name in names if check_target_module_exists(config, name)]
        assert matching_linear_names(tree(), patterns) == expected != []


@pytest.mark.parametrize(
    ("patterns", "excluded", "names"),
    [
        ("attn.*", None, ["attn.q_proj", "attn.o_proj"]),
        ("[qx]_proj", None, ["attn.q_proj"]),
        (["*"], ["q_proj", "q_proj_*"], ["attn.o_proj"]),
    ],
)
def test_patterns_are_of_whole_names_or_their_ends(patterns, excluded, names):
    assert matching_linear_names(tree(), patterns, excluded) == names


@pytest.mark.parametrize("excluded", ["attn.*", ["nowhere"]])
def test_exclusions_that_leave_nothing_or_match_nothing_are_refused(excluded):
    with pytest.raises(ValueError, match="exclude_modules"):
        matching_linear_names(tree(), ["*"], excluded)


@pytest.mark.parametrize("patterns", [["q_proj", "k_proj"], ["proj"], "(", ["q_proj_norm"]])
def test_patterns_that_match_nothing_are_refused(patterns):
    with pytest.raises(ValueError, match="expert_modules"):
        add_experts(tree(), patterns, **SETTINGS)


def test_expert_parameters_are_told_by_name():
    model = tree()
    base = set(model.state_dict())
    assert add_experts(model, ["q_proj"], **SETTINGS) == ["attn.q_proj"]
    added = set(model.state_dict()) - base
    assert added == {f"attn.q_proj.{n}" for n in ("lora_A", "lora_B", "router.weight", "router.bias")}
    assert {name for name in model.state_dict() if is_expert_parameter(name)} == added


def test_hooks_run_in_compiled_models_too():
    layer = random_layer(torch.float32)
    model, x = nn.Sequential(layer), torch.randn(3, 8)
    model.compile(backend="eager")
    expected = model(x)
    with record_router_logits(model) as calls:
        model(x)
    torch.testing.assert_close(calls["0"][0].logits, layer.router(x))
    with route_all_to(model, 1):
        forced = model(x)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(forced, base + layer.scaling * x @ layer.lora_A[1].T @ layer.lora_B[1].T)
    torch.testing.assert_close(model(x), expected)


def test_load_balancing_loss_equals_mixtrals_on_one_layer():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.manual_seed(0)
    logits = torch.randn(50, 6) * 2
    expected = load_balancing_loss_func((logits,), num_experts=6, top_k=2)
    torch.testing.assert_close(load_balancing_loss({"layer": logits}, 2), expected)


def test_load_balancing_loss_grows_as_tokens_gather():
    even = torch.eye(4).repeat(8, 1) * 9
    gathered = torch.tensor([9.0, 0, 0, 0]).repeat(32, 1).requires_grad_()
    assert load_balancing_loss({"layer": even}, 1).item() == pytest.approx(1.0)
    loss = load_balancing_loss({"layer": gathered}, 1)
    assert loss.item() == pytest.approx(4.0, abs=1e-2)
    # A step against the gradient takes weight from the crowded expert.
    assert torch.autograd.grad(loss, gathered)[0][:, 0].min() > 0
    with pytest.raises(ValueError, match="router_logits"):
        load_balancing_loss({}, 1)
