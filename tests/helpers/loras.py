"""A base without effective experts, and LoRAs of PEFT for it."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.reference import load_reference
from samoe_hf.model.processing_samoe import build_processor

ATTENTION = r"memory_attention\.layers\.\d+\.self_attn\.[qkv]_proj"
DOMAINS = ("shapes", "blobs")


def save_base_and_loras(folder: Path) -> Path:
    """Writes `base`, and `shapes` and `blobs`, which are LoRAs of different ranks and layers; returns the folder."""
    base = load_reference("nano", with_experts=False).model
    base.save_pretrained(folder / "base")
    build_processor(base.config).save_pretrained(folder / "base")
    _save_lora(base, folder / "shapes", 1, r=2, lora_alpha=4, target_modules=ATTENTION)
    _save_lora(base, folder / "blobs", 2, r=3, lora_alpha=6, target_modules=r"memory_attention.*\.[kv]_proj")
    return folder


def _save_lora(base, folder, seed, **settings):
    torch.manual_seed(seed)
    base.requires_grad_(False)
    made = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    made.save_pretrained(folder)
    made.unload()
