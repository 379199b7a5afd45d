"""The reference models and data: `nano` comes with the tests, the rest lies beside the repository."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Sam2VideoInferenceSession

from samoe_hf import SamoeModel
from samoe_hf.model.memory_attention import MemoryAttention
from samoe_hf.model.processing_samoe import build_processor

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
NANO = FIXTURES / "nano"
CHECKPOINT = NANO / "sam2.1_hiera_nano.pt"
EXPERTS = NANO / "samoe_nano_adapters.pt"
CONFIG = NANO / "sam2.1_hiera_nano_moe.yaml"
SHARED = ROOT.parent / "shared"
HEIGHT, WIDTH = 480, 854


def reference_folder(name: str) -> Path:
    """The folder of a reference model; `nano` comes with the tests, others lie beside the repository."""
    if name == "nano":
        return NANO
    folder = SHARED / "reference" / name
    if not folder.is_dir():
        pytest.skip(f"needs ../shared/reference/{name}, which is not part of the repository")
    return folder


def shared_data(name: str) -> Path:
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"needs ../shared/data/{name}, which is not part of the repository")
    return folder


def load_reference(name: str, with_experts: bool = True) -> SimpleNamespace:
    folder = reference_folder(name)
    files = {
        "checkpoint": folder / f"sam2.1_hiera_{name}.pt",
        "experts": folder / f"samoe_{name}_adapters.pt",
        "original_config": folder / f"sam2.1_hiera_{name}_moe.yaml",
    }
    model = SamoeModel.from_pretrained(
        files["checkpoint"],
        experts=files["experts"] if with_experts else None,
        original_config=files["original_config"],
    )
    return SimpleNamespace(
        name=name, folder=folder, model=model, load=lambda f: load_file(folder / f"{f}.safetensors"), **files
    )


def add_reference_prompts(processor, session, folder, obj_id):
    if obj_id == 1:
        given = {"input_points": [[[[420, 230], [700, 60]]]], "input_labels": [[[1, 0]]]}
    elif obj_id == 2:
        given = {"input_boxes": [[[300, 100, 560, 380]]]}
    else:
        given = {"input_masks": np.array(Image.open(folder / "mask_00000.png")) > 0}
    processor.add_inputs_to_inference_session(session, frame_idx=0, obj_ids=obj_id, **given)


def track_reference(model, folder, pixel_values, obj_ids=(1, 2, 3)):
    """Tracks the reference's objects, added one by one, through the given frames."""
    processor = build_processor(model.config)
    session = Sam2VideoInferenceSession(video=pixel_values, video_height=HEIGHT, video_width=WIDTH, dtype=torch.float32)
    for obj_id in obj_ids:
        add_reference_prompts(processor, session, folder, obj_id)
    frames = list(model.propagate_in_video_iterator(session))
    return torch.stack([frame.pred_masks[:, 0] for frame in frames], dim=1), frames, session


def memory_attention_inputs(model):
    generator = torch.Generator().manual_seed(0)
    size, tokens = model.config.memory_attention_hidden_size, 64
    shapes = [(tokens, 2, size), (tokens * 2, 2, 64), (tokens, 1, size), (tokens * 2, 1, 64)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@torch.no_grad()
def attend(model):
    """Output of the memory attention, in float64, where rounding hides nothing."""
    model = copy.deepcopy(model).double()
    return run_memory_attention(model.memory_attention, *(x.double() for x in memory_attention_inputs(model)))


def run_memory_attention(attention, image, memory, position, memory_position, num_pointer_tokens=0):
    """Output (objects, tokens, channels) of our or transformers' memory attention, of inputs (tokens, objects, …)."""
    if not isinstance(attention, MemoryAttention):
        out = attention(image, memory, position, memory_position, num_pointer_tokens)
        return out.squeeze(1).transpose(0, 1) if out.dim() == 3 else out.flatten(0, 1)
    image, memory, position, memory_position = (x.transpose(0, 1) for x in (image, memory, position, memory_position))
    num_maps = (memory.shape[1] - num_pointer_tokens) // image.shape[1]
    rotation = attention.rotary_emb.of_memories(
        lambda _: attention.position_ids, (1,) * num_maps, num_pointer_tokens, memory.device
    )
    return attention(image, position, memory, memory_position, rotation)


def change_config(folder: Path, **changes) -> None:
    """Changes `config.json`; names with double underscores reach into parts of it."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *parts, last = name.split("__")
        target = config
        for part in parts:
            target = target[part]
        target[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def assert_same_tensors(model, expected, but=None):
    """Both models have the same tensors, of the same types, to the bit, but for some that are given."""
    expected = {**expected.state_dict(), **(but or {})}
    assert model.state_dict().keys() == expected.keys()
    assert_tensors(model, expected)


def assert_tensors(model, expected):
    """A model has these tensors, of the same types, to the bit."""
    found = model.state_dict()
    assert not [n for n, x in expected.items() if found[n].dtype != x.dtype or not torch.equal(found[n], x)]
