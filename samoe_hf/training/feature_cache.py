"""A cache on disk for the features of a frozen image encoder, which is most of a training step's work."""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from samoe_hf.errors import InputError
from samoe_hf.model.base_model import SamoePreTrainedModel
from samoe_hf.model.base_modules import ImageFeatures
from samoe_hf.model.batch_rows import batch_rows, use_rows
from samoe_hf.model.domain_choice import encoder_has_experts
from samoe_hf.model.domain_experts import active_domain, module_domain
from samoe_hf.model.frame_step import encode_frames, with_positions
from samoe_hf.model.weights_io import hash_tensors, plain_tensors
from samoe_hf.whole_files import whole_file

LEVELS = ("fine", "middle", "coarse")


class FeatureCache:
    """Image features of frames, one safetensors file per frame.

    A frame's file is found by the frame's pixels, in a folder that is named after the encoder's weights. So a cache can
    be shared by runs, and nothing in it can ever be taken for what it is not. A file holds the three levels of
    [`~image_features.ImageFeatures`] in the type they were computed in: 8 MB per frame of 1024 x 1024 in bfloat16.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).expanduser()  # as transformers takes `output_dir`
        # What the fingerprint was computed from.
        self._structure = ""
        self._weights: dict[str, Tensor] = {}
        self._fingerprint = ""

    def encode_frames(
        self, model: SamoePreTrainedModel, pixel_values: Tensor, batch_size: int | None = None
    ) -> ImageFeatures:
        """Features of frames (rows, 3, S, S). Those that are not in the cache yet are encoded and written.

        Raises:
            InputError: if the image encoder is being trained, or is random (dropout), or its weights are sharded.
        """
        folder = self.folder / self._encoder_fingerprint(model)
        paths = [_path(folder, frame) for frame in pixel_values]
        missing = [index for index, path in enumerate(paths) if not path.is_file()]
        if missing:
            rows = batch_rows().rows
            with torch.no_grad(), use_rows(rows[index] for index in missing if rows):
                encoded = encode_frames(model, pixel_values[missing], batch_size)
            for row, index in enumerate(missing):
                with whole_file(paths[index]) as temporary:
                    save_file({name: getattr(encoded, name)[row].contiguous() for name in LEVELS}, temporary)
        files = [load_file(path) for path in paths]
        levels = [torch.stack([file[name] for file in files]).to(pixel_values.device) for name in LEVELS]
        return with_positions(model, *levels)

    def _encoder_fingerprint(self, model: SamoePreTrainedModel) -> str:
        """A name for the encoder's weights and structure; hashed only if they differ from a copy of the last ones."""
        tensors = dict(encoder_tensors(model))
        trained = [name for name, tensor in tensors.items() if tensor.requires_grad]
        if trained:
            raise InputError(f"`feature_cache` needs a frozen image encoder, but {trained[0]!r} is trainable.")
        use = active_domain()
        if model.vision_encoder.training and encoder_has_dropout(model, None if use is None else use.domain):
            raise InputError("`feature_cache` needs an image encoder without dropout; set `lora_dropout` to 0.")
        if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            raise InputError("`feature_cache` needs whole weights, but the model is sharded.")
        tensors = dict(plain_tensors(tensors.items()))
        structure = f"{model.config.vision_config.to_json_string()} {_adapter_state(model.vision_encoder)}"
        if encoder_has_experts(model):
            structure += f" {use}"
        kinds, known = ({n: (t.shape, t.dtype, t.device) for n, t in x.items()} for x in (tensors, self._weights))
        are_equal = kinds == known and all(torch.equal(tensor, self._weights[name]) for name, tensor in tensors.items())
        if structure != self._structure or not are_equal:
            self._structure = structure
            self._weights = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            named = ((f"{name} {tensor.dtype}", tensor) for name, tensor in tensors.items())
            digest = hashlib.sha256(f"{structure} {hash_tensors(named)}".encode())
            self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint


def _path(folder: Path, frame: Tensor) -> Path:
    """Where the features of a frame (3, S, S) are."""
    device = frame.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    name = hash_tensors([(f"{frame.dtype} {autocast}", frame)])[:32]
    return folder / name[:2] / f"{name}.safetensors"


def encoder_tensors(model: SamoePreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that image features depend on: the encoder, and the decoder's convolutions of them."""
    for module in ("vision_encoder", "mask_decoder.conv_s0", "mask_decoder.conv_s1"):
        for name, tensor in model.get_submodule(module).state_dict(keep_vars=True).items():
            yield f"{module}.{name}", tensor


def encoder_has_dropout(model: SamoePreTrainedModel, domain: str | None) -> bool:
    """Whether image features are random in training, with the experts of a domain or of none."""
    modules = model.vision_encoder.named_modules()
    within = [name.rpartition(".")[0] for name, module in modules if isinstance(module, nn.Dropout) and module.p > 0]
    return any(module_domain(name) in (None, domain) for name in within)


def _adapter_state(module: nn.Module) -> str:
    """What adapters within a module do beside their tensors: which are in use, and their scales."""
    layers = [
        (name, layer.active_adapters, layer.disable_adapters, getattr(layer, "scaling", None))
        for name, layer in module.named_modules()
        if hasattr(layer, "active_adapters") and hasattr(layer, "disable_adapters")
    ]
    return str(layers) if "peft" in sys.modules else ""
