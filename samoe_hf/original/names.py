"""Names of SAM 2's, SAM2-MoE's and SAM 3's tensors <-> names of this package's, experts stacked."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from samoe_hf.errors import InputError


def _mlp(original: str, ours: str, depth: int) -> dict[str, str]:
    """Names of the layers of a feed-forward network, which Sam2VideoModel counts without the first and the last."""
    middle = {f"{original}.layers.{i}": f"{ours}.layers.{i - 1}" for i in range(1, depth - 1)}
    return {f"{original}.layers.0": f"{ours}.proj_in", **middle, f"{original}.layers.{depth - 1}": f"{ours}.proj_out"}


# Beginnings of names, original -> ours; `*` stands for (a part of) one component. The longest that matches applies.
_RENAMES = {
    "image_encoder.trunk": "vision_encoder.backbone",
    "image_encoder.trunk.patch_embed.proj": "vision_encoder.backbone.patch_embed.projection",
    "image_encoder.trunk.blocks.*.norm*": "vision_encoder.backbone.blocks.*.layer_norm*",
    **_mlp("image_encoder.trunk.blocks.*.mlp", "vision_encoder.backbone.blocks.*.mlp", depth=2),
    "image_encoder.neck.convs.*.conv": "vision_encoder.neck.convs.*",
    "sam_prompt_encoder": "prompt_encoder",
    "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "shared_image_embedding.positional_embedding",
    "sam_prompt_encoder.mask_downscaling.0": "prompt_encoder.mask_embed.conv1",
    "sam_prompt_encoder.mask_downscaling.1": "prompt_encoder.mask_embed.layer_norm1",
    "sam_prompt_encoder.mask_downscaling.3": "prompt_encoder.mask_embed.conv2",
    "sam_prompt_encoder.mask_downscaling.4": "prompt_encoder.mask_embed.layer_norm2",
    "sam_prompt_encoder.mask_downscaling.6": "prompt_encoder.mask_embed.conv3",
    "sam_mask_decoder": "mask_decoder",
    "sam_mask_decoder.transformer.layers.*.norm*": "mask_decoder.transformer.layers.*.layer_norm*",
    "sam_mask_decoder.transformer.layers.*.*.out_proj": "mask_decoder.transformer.layers.*.*.o_proj",
    **_mlp("sam_mask_decoder.transformer.layers.*.mlp", "mask_decoder.transformer.layers.*.mlp", depth=2),
    "sam_mask_decoder.transformer.*.out_proj": "mask_decoder.transformer.*.o_proj",
    "sam_mask_decoder.transformer.norm_final_attn": "mask_decoder.transformer.layer_norm_final_attn",
    "sam_mask_decoder.output_upscaling.0": "mask_decoder.upscale_conv1",
    "sam_mask_decoder.output_upscaling.1": "mask_decoder.upscale_layer_norm",
    "sam_mask_decoder.output_upscaling.3": "mask_decoder.upscale_conv2",
    **_mlp("sam_mask_decoder.output_hypernetworks_mlps.*", "mask_decoder.output_hypernetworks_mlps.*", depth=3),
    **_mlp("sam_mask_decoder.*_head", "mask_decoder.*_head", depth=3),
    "memory_attention": "memory_attention",
    "memory_attention.norm": "memory_attention.layer_norm",
    "memory_attention.layers.*.norm*": "memory_attention.layers.*.layer_norm*",
    "memory_attention.layers.*.*.out_proj": "memory_attention.layers.*.*.o_proj",
    # The original counts convolutions, norms and activations.
    **{
        f"memory_encoder.mask_downsampler.encoder.{3 * i + k}": f"memory_encoder.mask_downsampler.layers.{i}.{layer}"
        for i in range(4)
        for k, layer in enumerate(("conv", "layer_norm"))
    },
    "memory_encoder.mask_downsampler.encoder.12": "memory_encoder.mask_downsampler.final_conv",
    "memory_encoder.pix_feat_proj": "memory_encoder.feature_projection",
    "memory_encoder.fuser.layers.*.dwconv": "memory_encoder.memory_fuser.layers.*.depthwise_conv",
    "memory_encoder.fuser.layers.*.norm": "memory_encoder.memory_fuser.layers.*.layer_norm",
    "memory_encoder.fuser.layers.*.pwconv*": "memory_encoder.memory_fuser.layers.*.pointwise_conv*",
    "memory_encoder.fuser.layers.*.gamma": "memory_encoder.memory_fuser.layers.*.scale",
    "memory_encoder.out_proj": "memory_encoder.projection",
    "maskmem_tpos_enc": "memory_temporal_positional_encoding",
    "no_mem_embed": "no_memory_embedding",
    "no_mem_pos_enc": "no_memory_positional_encoding",
    "no_obj_ptr": "no_object_pointer",
    "no_obj_embed_spatial": "occlusion_spatial_embedding_parameter",
    "mask_downsample": "mask_downsample",
    **_mlp("obj_ptr_proj", "object_pointer_proj", depth=3),
    "obj_ptr_tpos_proj": "temporal_positional_encoding_projection_layer",
}
EXPERT_TENSOR = re.compile(r"(?P<module>.+)\.experts\.(?P<index>\d+)\.lora_(?P<matrix>down|up)\.weight")
_GATE = re.compile(r"(?P<module>.+)\.gate\.gate\.(?P<leaf>weight|bias)")
_POINT_EMBEDDING = re.compile(r"sam_prompt_encoder\.point_embeddings\.(?P<index>\d+)\.weight")
_MATRICES = {"down": "lora_A", "up": "lora_B"}
# In `sam3.pt`: the image encoder, which the detector has, and the tracker, with what it names otherwise than SAM 2.
_SAM3_ENCODER, _SAM3_TRACKER = "detector.backbone.vision_backbone.", "tracker."
_SAM3_ENCODER_RENAMES = {
    "trunk": "backbone",
    "trunk.pos_embed": "backbone.embeddings.position_embeddings",
    "trunk.patch_embed.proj": "backbone.embeddings.patch_embeddings.projection",
    "trunk.ln_pre": "backbone.layer_norm",
    "trunk.blocks": "backbone.layers",
    "trunk.blocks.*.norm*": "backbone.layers.*.layer_norm*",
    "trunk.blocks.*.attn": "backbone.layers.*.attention",
    "trunk.blocks.*.attn.proj": "backbone.layers.*.attention.o_proj",
    "sam2_convs": "neck.fpn_layers",
    "sam2_convs.*.dconv_2x2": "neck.fpn_layers.*.scale_layers.0",
    "sam2_convs.*.dconv_2x2_0": "neck.fpn_layers.*.scale_layers.0",
    "sam2_convs.*.dconv_2x2_1": "neck.fpn_layers.*.scale_layers.2",
    "sam2_convs.*.conv_1x1": "neck.fpn_layers.*.proj1",
    "sam2_convs.*.conv_3x3": "neck.fpn_layers.*.proj2",
}
_SAM3_TRACKER_RENAMES = {
    "tracker.transformer.encoder.": "memory_attention.",
    "tracker.maskmem_backbone.": "memory_encoder.",
    "tracker.": "",
    ".mlp.lin1.": ".mlp.layers.0.",
    ".mlp.lin2.": ".mlp.layers.1.",
}
# Sam2VideoModel has one tensor for the four point embeddings, and two for the one positional embedding of prompts.
_POINT_EMBEDDINGS = "prompt_encoder.point_embed.weight"
_POSITIONAL_EMBEDDING = "shared_image_embedding.positional_embedding"
_POSITIONAL_EMBEDDING_COPY = "prompt_encoder.shared_embedding.positional_embedding"


def _compile(renames: Mapping[str, str]) -> list[tuple[re.Pattern, str]]:
    longest_first = sorted(renames.items(), key=lambda item: -len(item[0]))
    return [
        (re.compile(re.escape(old).replace(r"\*", r"([^.]+)") + r"(?=\.|$)"), new.replace("*", "{}"))
        for old, new in longest_first
    ]


_TO_OURS = _compile(_RENAMES)
_TO_ORIGINAL = _compile({ours: original for original, ours in _RENAMES.items()})
_SAM3_ENCODER_TO_OURS = _compile(_SAM3_ENCODER_RENAMES)


def _find(name: str, rules: list[tuple[re.Pattern, str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.match(name):
            return template.format(*match.groups()) + name[match.end() :]
    return None


def _rename(name: str, rules: list[tuple[re.Pattern, str]]) -> str:
    if (renamed := _find(name, rules)) is None:
        raise InputError(f"There is no tensor or module of the name {name!r} in SAM 2.")
    return renamed


def find_our_name(original_name: str) -> str | None:
    """The name here of a module of the original, None if SAM 2 has nothing of this name."""
    return _find(original_name, _TO_OURS)


def is_expert_name(original_name: str) -> bool:
    return bool(EXPERT_TENSOR.fullmatch(original_name) or _GATE.fullmatch(original_name))


def without_base_layer(original_name: str) -> str:
    return original_name.replace(".base_layer.", ".")


def _from_original_name(name: str) -> tuple[str, int | None]:
    """The name here of the original's tensor `name`, and its place in it if this is only a part of that tensor."""
    if match := EXPERT_TENSOR.fullmatch(name):
        return f"{_rename(match['module'], _TO_OURS)}.{_MATRICES[match['matrix']]}", int(match["index"])
    if match := _GATE.fullmatch(name):
        return f"{_rename(match['module'], _TO_OURS)}.router.{match['leaf']}", None
    if match := _POINT_EMBEDDING.fullmatch(name):
        return _POINT_EMBEDDINGS, int(match["index"])
    return _rename(without_base_layer(name), _TO_OURS), None


def state_dict_from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the original's names -> the same under this package's names, experts stacked, values unchanged."""
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for original_name, tensor in state_dict.items():
        name, index = _from_original_name(original_name)
        if index is None:
            result[name] = tensor
        else:
            parts.setdefault(name, {})[index] = tensor
    for name, numbered in parts.items():
        if sorted(numbered) != list(range(len(numbered))):
            raise InputError(f"{name} needs the parts 0 to {max(numbered)}, but has only {sorted(numbered)}.")
        tensors = [numbered[index] for index in range(len(numbered))]
        result[name] = torch.cat(tensors) if name == _POINT_EMBEDDINGS else torch.stack(tensors)
    if _POSITIONAL_EMBEDDING in result:
        # A copy of its own: tensors that share memory cannot be saved as safetensors.
        result[_POSITIONAL_EMBEDDING_COPY] = result[_POSITIONAL_EMBEDDING].clone()
    return result


def state_dict_to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of [`state_dict_from_original`].

    The base tensors of a module with experts are named as in full MoE checkpoints (`….q_proj.base_layer.weight`).
    """
    result: dict[str, Tensor] = {}
    with_experts = {name.removesuffix(".lora_A") for name in state_dict if name.endswith(".lora_A")}
    for name, tensor in state_dict.items():
        module, _, leaf = name.rpartition(".")
        if leaf in _MATRICES.values():
            matrix = "down" if leaf == _MATRICES["down"] else "up"
            prefix = f"{_rename(module, _TO_ORIGINAL)}.experts"
            result |= {f"{prefix}.{i}.lora_{matrix}.weight": part.clone() for i, part in enumerate(tensor)}
        elif module.endswith(".router"):
            result[f"{_rename(module.removesuffix('.router'), _TO_ORIGINAL)}.gate.gate.{leaf}"] = tensor
        elif name == _POINT_EMBEDDINGS:
            prefix = "sam_prompt_encoder.point_embeddings"
            result |= {f"{prefix}.{i}.weight": part.clone() for i, part in enumerate(tensor.split(1))}
        elif name == _POSITIONAL_EMBEDDING_COPY:
            original = state_dict.get(_POSITIONAL_EMBEDDING)
            if original is None or not (tensor.is_meta or torch.equal(tensor, original)):
                raise InputError(f"{_POSITIONAL_EMBEDDING} and {name} differ; the original has one tensor for both.")
        else:
            original_name = _rename(name, _TO_ORIGINAL)
            if module in with_experts:
                original_name = f"{original_name.removesuffix(leaf)}base_layer.{leaf}"
            result[original_name] = tensor
    return result


def _name_in_sam2(name: str) -> str:
    """What SAM 2 calls a tensor of SAM 3's tracker."""
    for sam3, sam2 in _SAM3_TRACKER_RENAMES.items():
        name = name.replace(sam3, sam2)
    return name


def _parts_of_encoder(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The names here of a tensor of `sam3.pt` or its parts, which are views; none if it is not of the encoder."""
    own = _find(name.removeprefix(_SAM3_ENCODER), _SAM3_ENCODER_TO_OURS)
    if own is None or not name.startswith(_SAM3_ENCODER) or own.endswith(".freqs_cis"):
        return
    own = f"vision_encoder.{own}"
    if ".qkv." in own:
        for letter, part in zip("qkv", torch.atleast_1d(tensor).chunk(3), strict=False):
            yield own.replace(".qkv.", f".{letter}_proj."), part
    elif own.endswith(".position_embeddings"):
        yield own, torch.atleast_3d(tensor)[:, 1:]  # without the class token's, which nothing reads
    else:
        yield own, tensor


def state_dict_from_sam3(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of SAM 3's tracker and of the image encoder that it reads, out of Meta's combined checkpoint."""
    tracker = {_name_in_sam2(name): x for name, x in state_dict.items() if name.startswith(_SAM3_TRACKER)}
    result = state_dict_from_original(tracker)
    for name, tensor in state_dict.items():
        result |= _parts_of_encoder(name, tensor)
    return result


def state_dict_into_sam3(state_dict: Mapping[str, Tensor], combined: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of Meta's combined checkpoint that [`state_dict_from_sam3`] reads, with the values of a model that
    fits it, in the types that they have there."""
    tracker = state_dict_to_original({n: x for n, x in state_dict.items() if not n.startswith("vision_encoder.")})
    result = {}
    for name, old in combined.items():
        if name.startswith(_SAM3_TRACKER):
            result[name] = tracker[_name_in_sam2(name)].to(old)
            continue
        new = old.clone()
        for own, part in _parts_of_encoder(name, new):
            part.copy_(state_dict[own])
            result[name] = new
    return result
