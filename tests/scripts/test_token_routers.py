"""Computed token routers send each domain to the experts that its LoRA has become."""

import pytest
import torch
from torch import nn

import token_routers
from helpers.loras import DOMAINS, save_base_and_loras
from samoe_hf import SamoeModel
from samoe_hf.analysis.routing import route_all_to
from samoe_hf.data import SyntheticVideos
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.loras import read_lora
from token_routers import assemble_with_routers, discriminants, routed_right


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base_and_loras(tmp_path_factory.mktemp("parts"))


def videos(seed=1):
    return {domain: SyntheticVideos(6, 4, (64, 64), domain=domain, seed=seed) for domain in DOMAINS}


@pytest.fixture(scope="module")
def assembled(folder):
    loras = {domain: folder / domain for domain in DOMAINS}
    settings = {"num_frames": 8, "experts_per_lora": 2, "show_progress_bar": False}
    return assemble_with_routers(folder / "base", loras, videos(), **settings)


def test_the_experts_are_the_loras(assembled, folder):
    config = assembled.config
    assert (config.num_experts, config.num_experts_per_tok, config.lora_rank, config.lora_alpha) == (4, 1, 3, 6.0)
    assert all(name.startswith("memory_attention") for name in assembled.expert_module_names)
    for expert, domain in ((0, "shapes"), (1, "shapes"), (2, "blobs"), (3, "blobs")):
        for name, (A, B, scale) in read_lora(folder / domain).layers.items():
            module = assembled.get_submodule(name)
            read = torch.randn(5, module.in_features)
            with route_all_to(assembled, expert), torch.no_grad():
                result = module(read) - nn.functional.linear(read, module.weight, module.bias)
            torch.testing.assert_close(result, scale * read @ A.T @ B.T, atol=1e-6, rtol=1e-4)


def test_domains_go_to_their_own_experts(assembled):
    held_out = [of_domain for of_domain in videos(seed=2).values()]
    shares = routed_right(assembled, build_processor(assembled.config), held_out, 8, show_progress_bar=False)
    assert set(shares) == set(assembled.expert_module_names)
    assert torch.stack(list(shares.values())).mean(dim=0).min() > 0.8
    swapped = routed_right(assembled, build_processor(assembled.config), held_out[::-1], 4, show_progress_bar=False)
    assert torch.stack(list(swapped.values())).mean(dim=0).max() < 0.2


def test_discriminants_tell_a_domain_between_two_clusters_of_another():
    torch.manual_seed(0)
    middle = torch.randn(3000, 3, dtype=torch.float64)
    sides = torch.randn(3000, 3, dtype=torch.float64)
    sides[:1500, 0] += 8
    sides[1500:, 0] -= 8

    def right(per_domain):
        weight, bias = discriminants([middle, sides], per_domain)
        chosen = ((x @ weight.T + bias).argmax(dim=1) // per_domain for x in (middle, sides))
        return [(domains == i).double().mean() for i, domains in enumerate(chosen)]

    assert min(right(4)) > 0.99 and min(right(1)) < 0.7


def test_the_program_writes_a_model(folder, tmp_path, capsys):
    sources = [f"{{kind: synthetic, domain: {d}, num_videos: 3, num_frames: 3, image_size: [64, 64]}}" for d in DOMAINS]
    datasets = [text for source in sources for text in ("--dataset", source)]
    settings = ["--frames", "3", "--device", "cpu", "--experts-per-lora", "1", "--output", str(tmp_path / "out")]
    token_routers.main([str(folder / "base"), *(str(folder / domain) for domain in DOMAINS), *datasets, *settings])
    assert "2 experts of rank 3" in capsys.readouterr().out
    assert SamoeModel.from_pretrained(tmp_path / "out").config.num_experts == 2
