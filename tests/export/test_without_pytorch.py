"""An environment with onnxruntime, NumPy and Pillow alone tracks as the package does; and other ways to export."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.domains import with_two_domains
from helpers.edgetam import edgetam_model, needs_timm, over_bases
from helpers.export import compare, difference, drawn_video, load_tracker, tracked, tracked_with_corrections
from helpers.sam3 import sam3_config, sam3_models
from samoe_hf import small_base
from samoe_hf.export.parts import COUNTS, SIGNATURES, sizes
from samoe_hf.export.write import export_model
from samoe_hf.inference import load_tracker as load_model
from samoe_hf.model.processing_samoe import build_processor

pytestmark = pytest.mark.slow
PROGRAM = """
import importlib.util, json, sys
import numpy as np
assert not importlib.util.find_spec("torch") and not importlib.util.find_spec("transformers")
sys.path.insert(0, sys.argv[1])
from run import Tracker
given = np.load("given.npz", allow_pickle=False)
prompts = json.load(open("prompts.json"))
for prompt in prompts:
    if "mask" in prompt:
        prompt["mask"] = given[prompt["mask"]]
tracked = Tracker(sys.argv[1]).track(given["frames"], prompts)
np.savez("logits.npz", **{str(t): logits for t, _, logits in tracked})
"""


@cache
def video():
    """Frames and masks. Drawing them takes seconds, which fast tests need not wait for."""
    return drawn_video(20, (480, 854))


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Of an environment that has what `run.py` needs, and nothing else."""
    folder, uv = tmp_path_factory.mktemp("environment") / "venv", Path(sys.executable).parent / "uv"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder], check=True)
    install = [uv, "pip", "install", "-q", "--python", folder / "bin" / "python", "onnxruntime", "numpy", "pillow"]
    if subprocess.run(install).returncode:
        pytest.skip("needs onnxruntime, NumPy and Pillow from a registry of packages")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small base, its processor, and its folder."""
    model, processor = load_model(small_base(), "cpu")
    folder = tmp_path_factory.mktemp("small")
    export_model(model.eval(), processor, folder)
    return model, processor, folder


def prompts_of(count: int, corrected: bool = False) -> list[dict]:
    """A mask, a box, or points for each object, some of them late, and one further prompt on a later frame; or all on
    the first frame, and a correction of each third object on a later one."""
    prompts, shapes = [], list(video()[1].values())
    for i in range(count):
        mask = shapes[i % len(shapes)]
        (y0, x0), (y1, x1) = np.argwhere(mask).min(0), np.argwhere(mask).max(0)
        y, x = np.argwhere(mask)[mask.sum() // 2]
        kinds = {"points": [[int(x), int(y)]], "labels": [1]}, {"box": [*map(int, (x0, y0, x1, y1))]}, {"mask": mask}
        prompts.append({"frame": i % 3 if count > 3 and not corrected else 0, "object": i + 1, **kinds[i % 3]})
        if corrected and i % 3 == 0:
            click = {"points": [[int(x0), int(y0)]], "labels": [0]}
            prompts.append({"frame": 12, "object": i + 1, "correction": True, **click})
    if corrected:
        return prompts
    return [*prompts, {"frame": 12, "object": 1, "box": prompts[0].get("box", [120, 90, 400, 300])}]


@pytest.mark.parametrize("track", [tracked, tracked_with_corrections])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_without_pytorch_it_tracks_as_the_package_does(python, small, count, track, tmp_path):
    model, processor, folder = small
    prompts = prompts_of(count, corrected=track is tracked_with_corrections)
    masks = {f"mask{i}": prompt["mask"] for i, prompt in enumerate(prompts) if "mask" in prompt}
    np.savez(tmp_path / "given.npz", allow_pickle=False, frames=np.stack(video()[0]), **masks)
    named = [{**prompt, "mask": f"mask{i}"} if "mask" in prompt else prompt for i, prompt in enumerate(prompts)]
    (tmp_path / "prompts.json").write_text(json.dumps(named))
    subprocess.run([python, "-c", PROGRAM, folder], cwd=tmp_path, check=True)
    with np.load(tmp_path / "logits.npz", allow_pickle=False) as file:
        ours = {int(t): logits for t, logits in file.items()}
    result = difference(track(model, processor, video()[0], prompts), ours)
    assert result.mean < 1e-3 and result.iou > 0.999


def test_in_float16_masks_are_nearly_the_same(small, tmp_path):
    model, processor, folder = small
    half, _ = load_model(small_base(), "cpu", "float16")
    export_model(half.eval(), processor, tmp_path / "half")
    result = compare(model, processor, load_tracker(tmp_path / "half"), video()[0], prompts_of(3))
    assert result.iou > 0.98
    sizes_of = [sum(path.stat().st_size for path in x.glob("*.onnx")) for x in (tmp_path / "half", folder)]
    assert sizes_of[0] < 0.7 * sizes_of[1]


@pytest.mark.parametrize("name", ["sam3", pytest.param("edgetam", marks=needs_timm), "domain a", "domain b"])
def test_other_models(name, tmp_path):
    bases = {
        "sam3": lambda: sam3_models(sam3_config(), with_experts=True)[0],
        "edgetam": lambda: edgetam_model(with_experts=True),
    }
    model = bases.get(name, with_two_domains)()
    if name in bases:
        model.config.memory_selection = "score"
    domain, side, processor = name.partition(" ")[2] or None, model.config.image_size, build_processor(model.config)
    export_model(model, processor, tmp_path / "model", domain)
    frames, masks = drawn_video(8, (side, side))
    prompts = [{"frame": 2, "object": 1, "box": [20, 20, 90, 80]}, {"frame": 0, "object": 2, "mask": masks[1]}]
    result = compare(model, processor, load_tracker(tmp_path / "model"), frames, prompts, domain=domain)
    assert result.mean < 1e-3 and result.iou > 0.999


@over_bases
def test_programs_of_torch_export_give_what_the_parts_give(nano, tmp_path):
    model = nano.model.eval()
    export_model(model, build_processor(model.config), tmp_path / "model", format="torch")
    assert not (tmp_path / "model" / "run.py").exists()
    torch.manual_seed(0)
    for name, signature in SIGNATURES.items():
        exported = torch.export.load(tmp_path / "model" / f"{name}.pt2")
        assert all(name == "image_encoder" or ".vision_encoder." not in key for key in exported.state_dict)
        program = exported.module()
        for counts in (COUNTS, dict.fromkeys(COUNTS, 1)):
            values = {key: value.example({**sizes(model), **counts}) for key, value in signature.inputs.items()}
            values = {key: torch.randn_like(x) if x.is_floating_point() else x for key, x in values.items()}
            with torch.inference_mode():
                expected, given = signature.part(model)(**values), program(**values)
            torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
