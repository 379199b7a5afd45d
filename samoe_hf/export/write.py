"""Writes a folder from which a video is tracked without PyTorch: the parts of a model, model.json and run.py."""

import copy
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers.image_utils import PILImageResampling

from samoe_hf import __version__
from samoe_hf.errors import InputError, input_errors
from samoe_hf.export.parts import COUNTS, SIGNATURES, Signature, Value, sizes
from samoe_hf.export.run import prepare
from samoe_hf.model.domain_experts import use_domain
from samoe_hf.model.expert_layer import replace_module
from samoe_hf.model.memory_selection import MIN_SCORE
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.model.prompts import PREVIOUS_MASK_LIMIT
from samoe_hf.surgery.experts import to_plain_linear
from samoe_hf.surgery.merge import BASE_ALONE, chosen_experts
from samoe_hf.whole_files import new_folder

OPSET = 20
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
# Of a model whose ONNX files hold their weights; 2 GB is the most that such a file can have.
MAX_BYTES = 1.5e9
MEMORY_SELECTIONS = ("recent", "score")
RESAMPLING = ("BICUBIC", "BILINEAR")
# In levels of 255: by how much `run.py` may prepare a frame otherwise than a processor does, on average.
MAX_DIFFERENCE = 0.01


def export_model(
    model: SamoeModel,
    processor: VideoProcessor,
    directory: str | os.PathLike,
    domain: str | None = None,
    format: str = "onnx",
    show_progress_bar: bool = False,
) -> None:
    """Writes the parts of a model, each in a file of its own, with what runs them.

    `model.json` says what each part takes and gives. With ONNX files, `run.py` tracks a video with onnxruntime, NumPy
    and Pillow. Single experts are merged into their layers. The model stays as it is.

    Args:
        directory: new or empty.
        domain: of a model with domains, the one whose experts are exported, or "base" for none.
        format: "onnx", or "torch" for programs of `torch.export` (`.pt2`).

    Raises:
        InputError: for a setting of the model, or of its processor, that `run.py` does not follow; if a model with
            domains is given without one, or there is no such domain; if `onnx` or `onnxscript` is not installed.
    """
    if format not in SUFFIXES:
        raise InputError(f"`format` must be one of {', '.join(map(repr, SUFFIXES))}, got {format!r}.")
    check(model, domain)
    description = {
        "samoe_hf": __version__,
        "format": format,
        "opset": OPSET if format == "onnx" else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "domain": domain,
        "image": image_settings(model, processor),
        "rules": rules_of(model),
        "parts": {name: _describe(name + SUFFIXES[format], x, model) for name, x in SIGNATURES.items()},
    }
    if format == "onnx":
        with input_errors("ONNX needs `pip install samoe_hf[export]`"):
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
    model = with_plain_layers(copy.deepcopy(model).cpu().eval().requires_grad_(False), domain)
    with new_folder(directory) as folder, use_domain(None if domain == BASE_ALONE else domain, model):
        for name in tqdm(SIGNATURES, desc="export", unit="part", disable=not show_progress_bar):
            write_part(model, SIGNATURES[name], folder / description["parts"][name]["file"])
        (folder / "model.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        if format == "onnx":
            shutil.copy(Path(__file__).with_name("run.py"), folder)


def check(model: SamoeModel, domain: str | None) -> None:
    """Refuses what the parts or `run.py` cannot do."""
    if model.dtype not in (torch.float32, torch.float16):
        raise InputError(f"A model of float32 or float16 is exported; its type is {model.dtype}.")
    config, limits = model.config, {"fill_hole_area": 0, "recent_memory_pooling": 1, "older_memory_pooling": 1}
    for name, expected in limits.items():
        if getattr(config, name) != expected:
            raise InputError(f"`{name}` must be {expected} in a model that is exported, got {getattr(config, name)}.")
    if model.num_maskmem == 0:
        raise InputError("A model without memory (`num_maskmem` 0) is not exported, since nothing is tracked by it.")
    if model.memory_selection not in MEMORY_SELECTIONS:
        raise InputError(
            f"`memory_selection` must be one of {', '.join(map(repr, MEMORY_SELECTIONS))} in a model that is exported, "
            f"got {model.memory_selection!r}; `run.py` does not look for doubles."
        )
    chosen_experts(model, domain)


def image_settings(model: SamoeModel, processor: VideoProcessor) -> dict[str, Any]:
    """How frames are prepared, in `run.py`'s words.

    Raises:
        InputError: if the processor does something else.
    """
    own = processor.video_processor
    resample = PILImageResampling(int(own.resample)).name
    if resample not in RESAMPLING:
        raise InputError(f"The processor's `resample` must be one of {', '.join(RESAMPLING)}, got {resample}.")
    settings = {
        "side": model.config.image_size,
        "mask_side": model.prompt_encoder.mask_input_size[0],
        "resample": resample,
        "mean": list(own.image_mean),
        "std": list(own.image_std),
    }
    frame = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    expected = processor.video_processor(videos=frame[None], return_tensors="pt").pixel_values_videos[0, 0].numpy()
    prepared = prepare(frame, settings)[0]
    difference = float(abs(prepared - expected).mean()) if prepared.shape == expected.shape else float("inf")
    if not difference * 255 * min(settings["std"]) <= MAX_DIFFERENCE:
        raise InputError(
            f"The processor must prepare frames by a resize to {settings['side']} x {settings['side']} pixels, its "
            f"`image_mean` {settings['mean']} and `image_std` {settings['std']}, and nothing else, as `run.py` does."
        )
    return settings


def rules_of(model: SamoeModel) -> dict[str, Any]:
    """The settings of what `run.py` decides."""
    config = model.config
    return {
        "memory_selection": model.memory_selection,
        "min_score": MIN_SCORE,
        "num_maps": model.num_maskmem,
        "max_pointers": config.max_object_pointers_in_encoder,
        "max_conditioning": config.max_cond_frame_num,
        "multimask": config.multimask_output_in_sam,
        "multimask_for_tracking": config.multimask_output_for_tracking,
        "multimask_min_points": config.multimask_min_pt_num,
        "multimask_max_points": config.multimask_max_pt_num,
        "previous_mask_with_clicks": config.previous_mask_with_clicks,
        "previous_mask_limit": PREVIOUS_MASK_LIMIT,
    }


def _describe(file: str, signature: Signature, model: SamoeModel) -> dict[str, Any]:
    """A part's file, and the types and shapes of what goes in and comes out; dimensions that vary have names."""

    def named(values: dict[str, Value]) -> dict[str, Any]:
        types = {name: str(value.dtype).removeprefix("torch.") for name, value in values.items()}
        return {name: {"type": types[name], "shape": value.sizes(sizes(model))} for name, value in values.items()}

    return {"file": file, "inputs": named(signature.inputs), "outputs": named(signature.outputs)}


def with_plain_layers(model: SamoeModel, domain: str | None) -> SamoeModel:
    """The model, whose layers are plain where they run one expert or none."""
    chosen = chosen_experts(model, domain)
    for layer in model.expert_module_names:
        linear, experts = model.get_submodule(layer), chosen.get(layer)
        assert isinstance(linear, nn.Linear)
        if experts is None or experts.num_experts == 1 or not experts.lora_B.any():
            plain = to_plain_linear(linear)
            if experts is not None and experts.num_experts == 1:
                plain.weight = nn.Parameter(experts.merge_into(linear.weight), requires_grad=False)
            replace_module(model, layer, plain)
    return model


def write_part(model: SamoeModel, signature: Signature, path: Path) -> None:
    """Writes one part to a file, which its suffix makes ONNX (`.onnx`) or a program of `torch.export` (`.pt2`)."""
    values = {name: value.example({**sizes(model), **COUNTS}) for name, value in signature.inputs.items()}
    counts = {name: torch.export.Dim(name, min=1) for name in COUNTS}
    varying = {
        name: {index: counts[size] for index, size in enumerate(value.shape) if size in counts}
        for name, value in signature.inputs.items()
    }
    part = signature.part(model)
    # With gradients nothing is computed in place, which would be slow in ONNX.
    with _quiet(), torch.enable_grad():
        if path.suffix == SUFFIXES["torch"]:
            program = torch.export.export(part, (), values, dynamic_shapes=varying)
            torch.export.save(_without_unused_tensors(program), path)
            return
        torch.onnx.export(
            part,
            (),
            path,
            kwargs=values,
            dynamic_shapes=varying,
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            opset_version=OPSET,
            dynamo=True,
            external_data=model.get_memory_footprint() > MAX_BYTES,
            verbose=False,
        )


def _without_unused_tensors(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without the model's tensors that only other parts read."""
    specs, tensors = program.graph_signature.input_specs, program.state_dict
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in list(zip(nodes, specs, strict=True)):
        if spec.target is not None and not node.users:
            program.graph.erase_node(node)
            specs.remove(spec)
            tensors.pop(spec.target, None)
            program.constants.pop(spec.target, None)
    program.graph_module.recompile()
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """While the context is open, nothing is said of how exporting goes on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
