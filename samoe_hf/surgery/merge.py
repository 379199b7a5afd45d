"""Plain weights: a model, or a domain, whose layers have one expert each is a LoRA, and is merged into the base."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Sam3VideoConfig
from transformers.utils import CONFIG_NAME

from samoe_hf.errors import InputError
from samoe_hf.model.base import SAM3, check_base, config_of_base
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.model.expert_layer import ExpertMixture, expert_modules, is_expert_parameter
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.weights_check import describe_mismatches, find_mismatches
from samoe_hf.model.weights_files import open_weights, own_names
from samoe_hf.surgery.domains import check_no_adapters, find_domain
from samoe_hf.whole_files import new_folder

if TYPE_CHECKING:
    from transformers import Sam2VideoModel, Sam3TrackerVideoModel

# Stands for no domain's experts where a domain is named.
BASE_ALONE = "base"


def merge_into_base(model: SamoeModel, domain: str | None = None) -> Union["Sam2VideoModel", "Sam3TrackerVideoModel"]:
    """transformers' own model with the weights of a model whose layers have one expert each, or none with an effect.

    It puts out the same, up to rounding: products are added in float32, and rounded once to the model's type. What
    else was trained comes along. The model itself stays as it is.

    Args:
        domain: of a model with domains, the one whose experts are merged, or "base" for none.

    Raises:
        InputError: if a router chooses among several experts, there is no such domain, the base is quantized, or the
            model has adapters of PEFT.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not is_expert_parameter(name)}
    for layer, experts in chosen_experts(model, domain).items():
        if experts.num_experts == 1:
            tensors[f"{layer}.weight"] = experts.merge_into(tensors[f"{layer}.weight"])
        elif experts.lora_B.any():
            raise InputError(
                f"A router chooses among {experts.num_experts} experts for each token of {layer!r}, which no plain "
                "weight does. Train one (`samoe adapt … --num_experts 1 --num_experts_per_tok 1`), or use the "
                "SamoeModel itself, as `samoe export` does."
            )
    with torch.random.fork_rng(devices=[]):
        plain = AutoModel.from_config(config_of_base(model.config), dtype=model.dtype)
    plain.load_state_dict(tensors)
    return plain.to(model.device).eval()


def chosen_experts(model: SamoeModel, domain: str | None) -> dict[str, ExpertMixture]:
    """The experts that are in use, by the names of their layers, of a model whose layers are about to become plain.

    Args:
        domain: see [`merge_into_base`].

    Raises:
        InputError: if a domain must be named, or there is no such one; if the base is quantized, or the model has
            adapters of PEFT.
    """
    check_no_adapters(model)
    if model.origin.quantized:
        raise InputError("The base is quantized, and its weights are rounded; load the model without quantization.")
    if domain == BASE_ALONE:
        return {}
    if domain is None and model.config.domains is not None:
        known = ", ".join(map(repr, [*model.config.domain_names, BASE_ALONE]))
        raise InputError(f"`domain` must say whose experts are taken, one of {known}; no gate chooses them here.")
    if domain is not None:
        find_domain(model, domain)
    return dict(expert_modules(model) if domain is None else domain_modules(model, domain))


def save_into_sam3(
    model: SamoeModel, domain: str | None, combined: str | os.PathLike, directory: str | os.PathLike
) -> bool:
    """Writes a copy of SAM 3, detector and tracker, whose tracker is this model's with its experts merged.

    Args:
        domain: see [`merge_into_base`].
        combined: a folder of transformers' Sam3VideoModel. Its tensors keep their types.
        directory: where to write; new or empty.

    Returns:
        whether the image encoder, which the detector shares, has other values than there.

    Raises:
        InputError: if the model's base is not SAM 3, or `combined` is no such folder or of another size; and as
            [`merge_into_base`].
    """
    check_base(model.config, SAM3)
    try:
        is_combined = Sam3VideoConfig.get_config_dict(combined)[0].get("model_type") == Sam3VideoConfig.model_type
    except OSError:
        is_combined = False
    if not is_combined or not os.path.isdir(combined):
        raise InputError(
            f"{combined} is neither Meta's sam3.pt nor a folder of SAM 3 as transformers saves it (Sam3VideoModel: "
            f"{CONFIG_NAME} and safetensors)."
        )
    tensors = merge_into_base(model, domain).state_dict()
    headers = open_weights(combined, {}, None).headers
    found = {own: headers[name] for own, name in own_names(SAM3, combined, headers).items()}
    problems = find_mismatches(found, tensors)
    if any(problems.values()):
        raise InputError(f"{combined} does not fit the model: {describe_mismatches(problems)}.")
    encoder_changed = False
    with new_folder(directory) as folder:
        for path in sorted(Path(combined).iterdir()):
            if path.suffix != ".safetensors":
                if path.is_file():
                    shutil.copy(path, folder)
                continue
            written = load_file(path)
            for name, tensor in written.items():
                if (own := SAM3.own_name(name)) is not None:
                    written[name] = tensors[own].to(tensor)
                    is_encoder = own.startswith("vision_encoder.backbone.")
                    encoder_changed |= is_encoder and not torch.equal(written[name], tensor)
            save_file(written, folder / path.name, metadata={"format": "pt"})
    return encoder_changed
