"""Meta's `edgetam.pt` <-> this package's configuration and tensors. Beside SAM 2's tensors it has a perceiver's."""

from collections.abc import Mapping

import torch
from torch import Tensor

from samoe_hf.data.configs import shipped_configs
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.base import EDGETAM, check_base
from samoe_hf.model.base_model import build_on_meta
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.expert_layer import is_expert_parameter

from .names import state_dict_from_original, state_dict_to_original

# Of the tensors that SAM 2 has as well: parts of names as SAM 2's are called, and here.
_LIKE_SAM2 = [
    ("vision_encoder.backbone.body.", "vision_encoder.backbone.timm_model."),
    *((f".linear{i}.", f".mlp.{name}_proj.") for i, name in ((1, "up"), (2, "down"))),
]
# Of the perceiver's: as Meta calls them, and here. Its keys and values are projected by one tensor.
_PERCEIVER = [
    ("perceiver.latents", "perceiver.latents_1d"),
    ("perceiver.norm.", "perceiver.layer_norm."),
    (".attn.norm_x.", ".layer_norm_input."),
    (".attn.norm_latents.", ".layer_norm_latents."),
    (".self_attn.norm.", ".layer_norm_self."),
    *((f".{ff}.{i}.", f".{mlp}.{name}.") for ff, mlp in (("ff", "mlp"), ("self_ff", "self_mlp"))
      for i, name in ((0, "layer_norm"), (1, "up_proj"), (3, "down_proj"))),
    *((f".{attn}.to_{x}.", f".{attention}.{name}_proj.")
      for attn, attention in (("attn", "cross_attention"), ("self_attn", "self_attention"))
      for x, name in (("q", "q"), ("kv", "kv"), ("out", "o"))),
]  # fmt: skip


def is_edgetam(names: Mapping[str, Tensor]) -> bool:
    """Whether tensors of these names are EdgeTAM's, as Meta names them."""
    return any(name.startswith("spatial_perceiver.") for name in names)


def edgetam_config(has_pointer_times: bool = False, has_occlusion: bool = False) -> SamoeConfig:
    """The published architecture."""
    config = SamoeConfig(**read_yaml(shipped_configs()["model_edgetam"]))
    config.enable_temporal_pos_encoding_for_object_pointers = has_pointer_times
    config.enable_occlusion_spatial_embedding = has_occlusion
    return config


def edgetam_tensors(config: SamoeConfig) -> dict[str, Tensor]:
    """The base's tensors in a model of this configuration, without values."""
    return {name: x for name, x in build_on_meta(config).state_dict().items() if not is_expert_parameter(name)}


def state_dict_from_edgetam(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by Meta's names -> by the names here."""
    like_sam2 = {name: x for name, x in tensors.items() if not name.startswith("spatial_perceiver.")}
    result = {_renamed(name, _LIKE_SAM2): x for name, x in state_dict_from_original(like_sam2).items()}
    for name in tensors.keys() - like_sam2.keys():
        own, x = _renamed(name, _PERCEIVER), tensors[name]
        if ".kv_proj." in own:
            key, value = x.chunk(2)
            result |= {own.replace(".kv_", ".k_"): key.clone(), own.replace(".kv_", ".v_"): value.clone()}
        else:
            result[own] = x
    return result


def state_dict_to_edgetam(config: SamoeConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of [`state_dict_from_edgetam`], of a model without experts on that base."""
    check_base(config, EDGETAM)
    back, result = [(own, theirs) for theirs, own in _PERCEIVER], {}
    like_sam2 = {name: x for name, x in tensors.items() if not name.startswith("spatial_perceiver.")}
    for name in tensors.keys() - like_sam2.keys():
        if ".k_proj." in name:
            joint = torch.cat([tensors[name], tensors[name.replace(".k_proj.", ".v_proj.")]])
            result[_renamed(name.replace(".k_proj.", ".kv_proj."), back)] = joint
        elif ".v_proj." not in name:
            result[_renamed(name, back)] = tensors[name]
    back = [(own, theirs) for theirs, own in _LIKE_SAM2]
    return state_dict_to_original({_renamed(name, back): x for name, x in like_sam2.items()}) | result


def _renamed(name: str, renames: list[tuple[str, str]]) -> str:
    """A name with the first part that is called otherwise replaced."""
    for old, new in renames:
        if old in name if old.endswith(".") else name.endswith(old):
            return name.replace(old, new)
    return name
