"""LoRAs that were trained apart, each on its domain, become domains of one model, whose videos its gate recognizes."""

import os
from collections.abc import Mapping, Sequence

import torch

from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError
from samoe_hf.inference import load_processor
from samoe_hf.model.expert_layer import has_effect
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.surgery.domains import add_domain
from samoe_hf.surgery.loras import add_lora_domain

from .fit_gate import fit_gate


def assemble(
    base: str | os.PathLike,
    loras: Mapping[str, str | os.PathLike | None],
    videos: Mapping[str, Sequence[Video]],
    *,
    show_progress_bar: bool = True,
    device: str | torch.device | None = None,
    **kwargs,
) -> SamoeModel:
    """Makes a model with a domain for each LoRA of PEFT; a video that the gate gives to it gets the LoRA's output.

    Args:
        base: the model that the LoRAs were trained on, as `SamoeModel.from_pretrained` takes it. It may have domains;
            experts that belong to none must be without effect.
        loras: domain -> folder or Hub id of a LoRA; None for a domain on which the base is good as it is.
        videos: domain -> videos with masks, from which the gate learns to recognize it.
        device: where the model is put and run.
        kwargs: of `from_pretrained`.

    Raises:
        InputError: if a domain has no videos, or cannot be added; see [`~surgery.loras.add_lora_domain`].
    """
    if missing := [domain for domain in loras if domain not in videos]:
        raise InputError(f"`videos` has none of the domain {missing[0]!r}; there are {', '.join(map(repr, videos))}.")
    # Nothing is said of new experts, which give place to domains.
    model, _ = SamoeModel.from_pretrained(base, output_loading_info=True, **kwargs)
    model.to(device)
    if model.config.domains is None and has_effect(model):
        raise InputError(
            f"`base` {base} has experts that belong to no domain, and a video gets those of one domain alone. Give the "
            "base without them, which the LoRAs must be of."
        )
    processor = load_processor(base, model)
    for domain, source in loras.items():
        if source is None:
            add_domain(model, domain, num_experts=0)
        else:
            add_lora_domain(model, domain, source)
        fit_gate(model, processor, domain, videos[domain], show_progress_bar)
    return model
