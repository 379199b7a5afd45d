"""A cache on disk for the features of a frozen image encoder, which is most of a training step's work.

A frame's file is found by the frame's pixels, in a folder that is named after the encoder's weights. So a cache can be
shared by runs, and nothing in it can ever be taken for what it is not; frames that are augmented at random never come
again, and gain nothing.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Sam2VideoModel

from samoe_hf.model.adapters import adapter_state
from samoe_hf.model.files import whole_file
from samoe_hf.model.frame_step import ImageFeatures, image_features, with_positions

LEVELS = ("fine", "middle", "coarse")


class FeatureCache:
    """Image features of frames, one safetensors file per frame.

    A file holds the three levels of [`~frame_step.ImageFeatures`] in the type they were computed in: 8 MB per frame of
    1024 x 1024 in bfloat16, 17 MB in float32.

    Args:
        folder: where the files are; it is made when the first frame is written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._weights: tuple | None = None
        self._fingerprint = ""

    def image_features(
        self, model: Sam2VideoModel, pixel_values: Tensor, batch_size: int | None = None
    ) -> ImageFeatures:
        """As [`~frame_step.image_features`]; frames that are not in the cache yet are encoded and written.

        Raises:
            ValueError: if the image encoder is being trained, or is random (dropout), or its weights are sharded.
        """
        paths = [self._path(model, frame) for frame in pixel_values]
        missing = [index for index, path in enumerate(paths) if not path.is_file()]
        if missing:
            with torch.no_grad():
                encoded = image_features(model, pixel_values[missing], batch_size)
            for row, index in enumerate(missing):
                with whole_file(paths[index]) as temporary:
                    save_file({name: getattr(encoded, name)[row].contiguous() for name in LEVELS}, temporary)
        files = [load_file(path) for path in paths]
        levels = [torch.stack([file[name] for file in files]).to(pixel_values.device) for name in LEVELS]
        return with_positions(model, *levels)

    def _path(self, model: Sam2VideoModel, frame: Tensor) -> Path:
        digest = hashlib.blake2b(digest_size=16)
        device = frame.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        digest.update(f"{tuple(frame.shape)} {frame.dtype} {autocast}".encode())
        digest.update(_bytes(frame))
        name = digest.hexdigest()
        return self.folder / self._encoder_fingerprint(model) / name[:2] / f"{name}.safetensors"

    def _encoder_fingerprint(self, model: Sam2VideoModel) -> str:
        """A name for the encoder's weights and structure, computed anew only when a weight has been written to."""
        tensors = dict(encoder_tensors(model))
        trained = [name for name, tensor in tensors.items() if tensor.requires_grad]
        if trained:
            raise ValueError(f"`feature_cache` needs a frozen image encoder, but {trained[0]!r} is trainable.")
        if any(m.training and m.p > 0 for m in model.vision_encoder.modules() if isinstance(m, nn.Dropout)):
            raise ValueError("`feature_cache` needs an image encoder without dropout; set `lora_dropout` to 0.")
        weights = (adapter_state(model.vision_encoder), *((id(t), t._version) for t in tensors.values()))
        if weights != self._weights:
            if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
                raise ValueError("`feature_cache` needs whole weights, but the model is sharded.")
            digest = hashlib.blake2b(model.config.vision_config.to_json_string().encode(), digest_size=16)
            digest.update(weights[0].encode())
            for name, tensor in tensors.items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(_bytes(tensor))
            self._weights, self._fingerprint = weights, digest.hexdigest()
        return self._fingerprint


def encoder_tensors(model: Sam2VideoModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that image features depend on: the encoder, and the decoder's convolutions of them."""
    for module in ("vision_encoder", "mask_decoder.conv_s0", "mask_decoder.conv_s1"):
        for name, tensor in model.get_submodule(module).state_dict(keep_vars=True).items():
            yield f"{module}.{name}", tensor


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
