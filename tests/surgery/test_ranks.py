"""Ranks of a domain's experts are raised without effect and cut layer by layer; files and LoRAs hold them."""

import pytest
import torch

from helpers.domains import add_learned_domain, new_model
from samoe_hf import SamoeModel
from samoe_hf.model.domain_experts import domain_modules, use_domain
from samoe_hf.surgery.domains import add_domain, copy_domain_experts
from samoe_hf.surgery.loras import add_lora_domain, export_expert
from samoe_hf.surgery.ranks import set_ranks, sort_directions


@pytest.fixture
def model():
    model = new_model()
    add_learned_domain(model, "a", 1, num_experts=2, num_experts_per_tok=1, lora_rank=3)
    add_learned_domain(model, "b", 2, num_experts=1, num_experts_per_tok=1, lora_rank=4)
    return model


def products(model, name):
    return {n: x.scaling * (x.lora_B @ x.lora_A).detach() for n, x in domain_modules(model, name)}


def outputs(model, name):
    torch.manual_seed(0)
    with use_domain(name), torch.no_grad():
        layers = [model.get_submodule(layer) for layer in model.expert_module_names]
        return torch.cat([layer(torch.randn(7, layer.in_features)) for layer in layers], dim=1)


@pytest.mark.parametrize("name", ["a", "b"])
def test_raised_ranks_and_sorted_directions_change_nothing(model, name):
    before, expected = outputs(model, name), products(model, name)
    set_ranks(model, name, 80)  # more than some layers have features
    assert model.config.domains["ab".index(name)]["lora_rank"] == 80
    assert min(min(model.get_submodule(layer).weight.shape) for layer in expected) < 80
    torch.testing.assert_close(outputs(model, name), before)
    energies = sort_directions(model, name)
    torch.testing.assert_close(outputs(model, name), before)
    for layer, product in expected.items():
        values = torch.linalg.svdvals(product.double()).square().sum(dim=0)
        count = min(80, len(values))
        torch.testing.assert_close(energies[layer][:count], values[:count], atol=1e-9, rtol=1e-4)
        assert len(energies[layer]) == 80


def test_the_scale_falls_with_the_root_of_the_rank_so_that_raised_experts_do_not_learn_too_fast(model):
    scales = {n: x.scaling for n, x in domain_modules(model, "b")}
    for rank, factor in ((16, 0.5), (4, 1.0)):  # from 4, and back
        set_ranks(model, "b", rank)
        assert {n: x.scaling for n, x in domain_modules(model, "b")} == {n: factor * v for n, v in scales.items()}
        assert model.config.domains[1]["lora_alpha"] / rank == factor * next(iter(scales.values()))


@torch.no_grad()
def test_layers_of_other_ranks_are_saved_and_loaded_and_other_domains_stay(model, tmp_path):
    others = {n: x.clone() for n, x in model.state_dict().items() if ".domain_b." not in n}
    best = {n: torch.linalg.svd(x[0].double()) for n, x in products(model, "b").items()}
    sort_directions(model, "b")
    layers = list(best)
    ranks = dict(zip(layers, [0, 1, 2] + [3] * len(layers), strict=False))
    set_ranks(model, "b", ranks)
    left = products(model, "b")
    assert list(left) == layers[1:]
    for layer, product in left.items():
        U, S, Vh = (x[..., : ranks[layer]] if x.dim() == 1 else x for x in best[layer])
        nearest = U[:, : ranks[layer]] * S @ Vh[: ranks[layer]]
        torch.testing.assert_close(product[0], nearest.float(), atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "model")
    again = SamoeModel.from_pretrained(tmp_path / "model").eval()
    assert again.config.domains == model.config.domains
    assert again.config.domains[1]["rank_pattern"] == {layers[1]: 1, layers[2]: 2} and "rank_pattern" not in others
    state = again.state_dict()
    assert all(torch.equal(tensor, state[n]) for n, tensor in others.items())
    assert torch.equal(outputs(again, "b"), outputs(model, "b"))
    add_domain(again, "copy", like="b")
    assert torch.equal(outputs(again, "copy"), outputs(model, "b"))
    export_expert(model, 0, tmp_path / "lora", domain="b")
    add_lora_domain(again, "lora", tmp_path / "lora")
    torch.testing.assert_close(outputs(again, "lora"), outputs(model, "b"))


def test_experts_of_lower_ranks_in_fewer_layers_are_copied(model):
    layers = [layer for layer, _ in domain_modules(model, "b")]
    set_ranks(model, "b", dict.fromkeys(layers, 2) | {layers[0]: 0, layers[1]: 1})
    for rank, fits in ((1, False), (6, True)):
        add_domain(model, f"new{rank}", num_experts=1, num_experts_per_tok=1, lora_rank=rank, lora_alpha=5.0)
        assert copy_domain_experts(model, "b", f"new{rank}") is fits
    torch.testing.assert_close(outputs(model, "new6"), outputs(model, "b"))
    assert torch.equal(outputs(model, "new1"), outputs(model, None))
    assert not copy_domain_experts(model, "a", "new1")


@pytest.mark.parametrize("ranks", [{}, {"no_layer": 1}, 0, -1])
def test_ranks_that_cannot_be_are_refused(model, ranks):
    with pytest.raises(ValueError, match=r"`ranks` must be a rank of each of the \d+ layers of 'a'"):
        set_ranks(model, "a", ranks)
