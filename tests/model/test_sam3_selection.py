"""Memories chosen by score: the masks, scores and IoUs are those of Meta's own code of SAM 3's tracker.

`fixtures/sam3_tracker.safetensors` was made with the package `sam3` 0.1.4, which lives in an environment of its own:
`uv run tests/programs/sam3_tracker.py tests/fixtures/sam3_tracker.safetensors` makes it again.
"""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Sam2VideoInferenceSession

from helpers.reference import FIXTURES
from helpers.sam3 import sam3_config
from helpers.sam3_clip import HIDDEN, NUM_FRAMES, PASSES, PROMPTS, SIZE, STRIDE, draw_features, draw_weight
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.model import tracking
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.frame_step import with_positions
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.original.names import state_dict_from_original, state_dict_to_original

EXPECTED = load_file(FIXTURES / "sam3_tracker.safetensors")
# What `sam3` names otherwise than `sam2`.
NAMES = {
    "memory_attention.": "transformer.encoder.",
    "memory_encoder.": "maskmem_backbone.",
    ".mlp.layers.0.": ".mlp.lin1.",
    ".mlp.layers.1.": ".mlp.lin2.",
}


def name_in_sam3(name: str) -> str:
    for sam2, sam3 in NAMES.items():
        name = name.replace(sam2, sam3)
    return name


@pytest.fixture(scope="module")
def model():
    """A base with the clip's weights. Its experts have no effect, and its image encoder is not run."""
    config = sam3_config(image_size=SIZE, patch_size=STRIDE, memory_fuser_intermediate_dim=4 * HIDDEN)
    model = SamoeModel(SamoeConfig.from_dict(config.to_dict())).double().eval()
    own = {n: x for n, x in model.state_dict().items() if not (n.startswith("vision_") or is_expert_parameter(n))}
    shapes = {name: x.shape for name, x in state_dict_to_original(own).items()}
    drawn = {name: torch.from_numpy(draw_weight(name_in_sam3(name), shape)) for name, shape in shapes.items()}
    model.load_state_dict(state_dict_from_original(drawn), strict=False)
    return model


@pytest.fixture(autouse=True)
def frames_have_the_features_of_the_clip(monkeypatch):
    """A frame's pixels are its number."""
    features = [torch.from_numpy(level) for level in draw_features()]

    def encode(model, pixel_values):
        frames = pixel_values[:, 0, 0, 0].long()
        return with_positions(model, *(level[frames] for level in features))

    monkeypatch.setattr(tracking, "encode_frames", encode)


def start(model, *names):
    """A session with the prompts of objects."""
    video = torch.arange(NUM_FRAMES).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)
    session = Sam2VideoInferenceSession(video=video, video_height=SIZE, video_width=SIZE, dtype=torch.float64)
    processor = build_processor(model.config)
    for object_id, name in enumerate(names):
        for frame_idx, prompt in PROMPTS[name].items():
            if "point" in prompt:
                given = {"input_points": [[[prompt["point"]]]], "input_labels": [[[1]]]}
            elif "box" in prompt:
                given = {"input_boxes": [[prompt["box"]]]}
            else:
                left, top, right, bottom = prompt["mask"]
                mask = torch.zeros(SIZE, SIZE)
                mask[top:bottom, left:right] = 1
                given = {"input_masks": [mask]}
            processor.add_inputs_to_inference_session(session, frame_idx, object_id, **given)
    return session


def difference(outputs, case, row=0):
    """How far masks, scores and IoUs of an object's tracked frames are from Meta's: the largest mean."""
    name, _ = PASSES[case]
    outputs = {output.frame_idx: output for output in outputs}
    assert len(outputs) == NUM_FRAMES
    tracked = [t for t in range(NUM_FRAMES) if t not in PROMPTS[name]]
    parts = {"masks": "pred_masks", "scores": "object_score_logits", "ious": "iou_scores"}
    found = {part: torch.stack([outputs[t][key][row].squeeze() for t in tracked]) for part, key in parts.items()}
    return max((x - EXPECTED[f"{case}.{part}"][tracked]).abs().mean().item() for part, x in found.items())


def track(model, case):
    name, passes = PASSES[case]
    session = start(model, name)
    return [x for back in passes for x in model.propagate_in_video_iterator(session, min(PROMPTS[name]), reverse=back)]


@pytest.mark.parametrize("case", PASSES)
def test_an_object_is_tracked_as_by_meta(model, case):
    assert model.memory_selection == "score"
    assert difference(track(model, case), case) < 1e-6


def test_each_of_several_objects_is_tracked_as_alone(model):
    """Meta's code chooses by the mean of all objects' scores, and is asked here for each alone."""
    outputs = model.propagate_from_prompts_iterator(start(model, *PROMPTS))
    outputs = [output for output in outputs if len(output.object_ids) == len(PROMPTS)]
    assert all(difference(outputs, name, row) < 1e-6 for row, name in enumerate(PROMPTS))


@pytest.mark.parametrize("case", [*PASSES][::3])
def test_the_choice_matters(model, case, monkeypatch):
    """Low and high scores are mixed; with the last frames as memories masks are others."""
    scores = (EXPECTED[f"{case}.scores"].sigmoid() * 2 - 1) * EXPECTED[f"{case}.ious"]
    assert 8 < (scores > 0.01).sum() < NUM_FRAMES - 8
    monkeypatch.setattr(model.config, "memory_selection", "recent")
    assert difference(track(model, case), case) > 0.1
