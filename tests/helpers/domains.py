"""A model with domains for tests of what chooses among them."""

import copy

import torch

from samoe_hf import SamoeModel
from samoe_hf.surgery.domains import add_domain, rename_domain


def with_second_domain(model: SamoeModel) -> SamoeModel:
    """A copy whose experts are the domain `first`, and whose domain `second` changes what is put out."""
    model = copy.deepcopy(model)
    rename_domain(model, None, "first")
    add_domain(model, "second", num_experts=2, num_experts_per_tok=1, lora_rank=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "domain_second" in name and "lora" in name:
                parameter.normal_(0, 0.3)
    return model
