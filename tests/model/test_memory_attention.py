"""Memory attention: what is computed in another order is the same."""

import pytest
import torch
from torch.nn import functional as F

from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml
from samoe_hf.model import memory_attention
from samoe_hf.model.domain_experts import DomainLinear, use_domain
from samoe_hf.model.experts import ExpertLinear, expert_modules
from samoe_hf.model.memory_attention import _mean_of_narrow

SETTINGS = {"num_experts": 5, "num_experts_per_tok": 2, "lora_rank": 3, "lora_alpha": 2.0}


@pytest.fixture
def model_with_effect():
    torch.manual_seed(0)
    model = SamoeModel(SamoeConfig(**read_yaml("model_nano")))
    for _, module in expert_modules(model):
        torch.nn.init.normal_(module.lora_B, std=0.1)
    return model


def random_layer(kind):
    torch.manual_seed(0)
    if kind == "domain":
        layer = DomainLinear(16, 24).double()
        layer.add_domain("a", **SETTINGS)
        torch.nn.init.normal_(layer.domain_a.lora_B)
        return layer.eval()
    layer = ExpertLinear(16, 24, **SETTINGS).double().eval()
    torch.nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("kind", ["experts", "domain"])
@torch.inference_mode()
def test_a_mean_of_outputs_is_finished_from_a_mean_of_features(kind):
    layer = random_layer(kind)
    tokens = torch.randn(2, 7, 16, dtype=torch.float64)
    weights = torch.rand(2, 3, 7, dtype=torch.float64).softmax(dim=-1)
    with use_domain("a"):
        features, finish = layer.linear_of_tokens(tokens)
        assert features.shape[-1] == 16 + 5 * 3
        torch.testing.assert_close(finish(weights @ features), weights @ layer(tokens))
    if kind == "domain":
        features, finish = layer.linear_of_tokens(tokens)
        assert torch.equal(finish(features), layer(tokens)) and features is tokens


@pytest.mark.parametrize("large", [False, True])
@torch.inference_mode()
def test_attention_to_narrow_values_is_attention(monkeypatch, large):
    torch.manual_seed(0)
    # Neither numbers of queries nor of keys are multiples of a block's; one key outweighs all before it.
    query, key = torch.randn(3, 1, 70, 32), torch.randn(3, 1, 330, 32)
    key[:, :, 200] *= 20
    value = torch.randn(3, 1, 330, 20)
    monkeypatch.setattr(memory_attention, "LARGE_ATTENTION", 1 if large else 10**9)
    monkeypatch.setattr(memory_attention, "QUERIES_AT_ONCE", 32)
    monkeypatch.setattr(memory_attention, "KEYS_AT_ONCE", 64)
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.3)
    found = _mean_of_narrow(query, key, value, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("large", [False, True])
def test_the_memory_attention_is_that_of_plain_attention(monkeypatch, model_with_effect, large):
    torch.manual_seed(1)
    model, tokens = model_with_effect.double().eval(), 64
    image = torch.randn(1, tokens, model.hidden_dim, dtype=torch.float64)
    memory = torch.randn(3, 2 * tokens + 4, model.mem_dim, dtype=torch.float64)
    inputs = (model.memory_attention, image, image, memory, memory[:1], 4)
    seen = []
    narrow = memory_attention._mean_of_narrow
    monkeypatch.setattr(memory_attention, "_mean_of_narrow", lambda *args: seen.append(1) or narrow(*args))
    monkeypatch.setattr(memory_attention, "LARGE_ATTENTION", 1 if large else 10**9)
    with torch.inference_mode():
        found = model.attend_to_memory(*inputs)
    assert len(seen) == len(model.memory_attention.layers)
    expected = model.attend_to_memory(*inputs).detach()
    assert len(seen) == len(model.memory_attention.layers)  # gradients are wanted
    torch.testing.assert_close(found, expected)


def test_hooks_of_a_values_projection_run(model_with_effect):
    model, calls = model_with_effect.eval(), []
    model.memory_attention.layers[0].cross_attn_image.v_proj.register_forward_hook(lambda *_: calls.append(1))
    image, memory = torch.randn(1, 64, model.hidden_dim), torch.randn(1, 64, model.mem_dim)
    with torch.inference_mode():
        model.attend_to_memory(model.memory_attention, image, image, memory, memory, 0)
    assert calls == [1]
