"""Models with domains."""

import copy

import torch

from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.surgery.domains import add_domain, rename_domain

ENCODER_AND_MEMORY = ["qkv", "q_proj", "v_proj"]


def with_second_domain(model: SamoeModel) -> SamoeModel:
    """A copy whose experts are the domain `first`, and whose domain `second` changes what is put out."""
    model = copy.deepcopy(model)
    rename_domain(model, None, "first")
    add_domain(model, "second", num_experts=2, num_experts_per_tok=1, lora_rank=4)
    torch.manual_seed(0)
    for _, experts in domain_modules(model, "second"):
        torch.nn.init.normal_(experts.lora_A, std=0.3)
        torch.nn.init.normal_(experts.lora_B, std=0.3)
    return model


def new_model() -> SamoeModel:
    """A random model that sees objects, or its masks would not differ."""
    torch.manual_seed(0)
    model = SamoeModel(SamoeConfig(**read_yaml("model_nano"))).eval()
    list(model.mask_decoder.pred_obj_score_head.parameters())[-1].data.fill_(10)
    return model


def add_learned_domain(model: SamoeModel, name: str, seed: int, **settings) -> None:
    """Adds a domain whose experts have an effect."""
    torch.manual_seed(seed)
    add_domain(model, name, **settings)
    for _, experts in domain_modules(model, name):
        torch.nn.init.normal_(experts.lora_B, std=0.1)


def with_two_domains() -> SamoeModel:
    """Two domains of different sizes in different layers; experts of the second, b, are in the encoder too."""
    model = new_model()
    add_learned_domain(model, "a", 1, num_experts=3, num_experts_per_tok=1, lora_rank=2)
    add_learned_domain(model, "b", 2, num_experts=4, lora_rank=3, expert_modules=ENCODER_AND_MEMORY)
    return model


@torch.no_grad()
def clip_masks(model: SamoeModel, batch, domain) -> torch.Tensor:
    return model(*batch, domain=domain).pred_masks
