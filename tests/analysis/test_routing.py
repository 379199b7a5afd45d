"""What routers put out is observed by frame and object, and drawn over the frames."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam2VideoInferenceSession

from helpers.pictures import rgb
from helpers.sam3 import sam3_config, sam3_models
from samoe_hf.analysis.routing import observe_routers, routing_maps
from samoe_hf.data import Video, read_video
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.model.expert_router import top_k_gates
from samoe_hf.model.processing_samoe import build_processor

QUERY = "memory_attention.layers.1.cross_attn_image.q_proj"
FIRST_SELF_ATTENTION = "memory_attention.layers.0.self_attn.q_proj"


def observed(model, video, prompts, **options):
    """Tracks in one session; `prompts`: (frame, object) -> what is given. (module, frame, object) -> its logits."""
    processor, calls = build_processor(model.config), {}
    pixels = processor.video_processor(videos=np.stack(list(video.frames)), return_tensors="pt").pixel_values_videos[0]
    height, width = video.size
    session = Sam2VideoInferenceSession(
        video=pixels, video_height=height, video_width=width, dtype=torch.float32, **options
    )

    def observe(name, rows, logits):
        places = [(name, row.frame_idx, row.object_id) for row in rows]
        calls.update(zip(places, logits, strict=True))

    with observe_routers(model, observe):
        for t in range(len(video)):
            for (frame_idx, object_id), prompt in prompts.items():
                if frame_idx == t:
                    processor.add_inputs_to_inference_session(session, t, object_id, **prompt)
            model(session, frame_idx=t)
    return calls


def test_objects_in_several_batches_are_told_apart(nano, entering):
    """An object that was clicked on another frame reads other memories, in a batch of its own behind the others."""
    prompts = {(0, i): {"input_masks": entering.masks(4, [i])[0]} for i in (2, 5, 9)}
    prompts[2, 5] = {"input_points": [[[[60, 40]]]], "input_labels": [[[1]]]}
    together = observed(nano.model, entering, prompts)
    assert {object_id for name, _, object_id in together if name == FIRST_SELF_ATTENTION} == {None}
    for object_id in (2, 5, 9):
        own = {place: prompt for place, prompt in prompts.items() if place[1] == object_id}
        alone = observed(nano.model, entering, own)
        for t in (1, 3, 4):
            key = (QUERY, t, object_id)
            torch.testing.assert_close(together[key], alone[key], atol=5e-3, rtol=0)
    assert (together[QUERY, 3, 9] - together[QUERY, 3, 5]).abs().max() > 0.2


def test_routing_maps_hold_the_expert_of_largest_gate(nano, entering):
    seen = {}

    def observe(name, rows, logits):
        if name == QUERY:
            gates = top_k_gates(logits, 2)
            seen.update({row[1:]: gate.argmax(dim=-1).view(8, 8) for row, gate in zip(rows, gates, strict=True)})

    with observe_routers(nano.model, observe):
        masks, _ = segment_video(nano.model, build_processor(nano.model.config), entering)
    maps = routing_maps(nano.model, entering)
    assert maps.module == QUERY and maps.object_ids == [2, 5, 9] and maps.experts.shape == (5, 3, 8, 8)
    first = {2: 1, 5: 3, 9: 2}
    for t, (column, object_id) in itertools.product(range(5), enumerate(maps.object_ids)):
        if t < first[object_id]:
            assert (maps.experts[t, column] == -1).all() and (t, object_id) not in seen
        else:
            np.testing.assert_array_equal(maps.experts[t, column], seen[t, object_id])
    np.testing.assert_array_equal(maps.masks, masks)


@pytest.mark.parametrize("base", ["sam2", "sam3"])
def test_routing_maps_are_laid_out_as_the_image_is(nano, base):
    """Only a corner of the image is lit, and the positions that are routed differently must be there."""
    model, module = nano.model, "memory_attention.layers.0.self_attn.q_proj"
    if base == "sam3":  # in its encoder, whose other layers see windows
        module = "vision_encoder.backbone.layers.0.mlp.fc1"
        model, _ = sam3_models(sam3_config(), with_experts=True, expert_modules=[module, "layers.*.attention.q_proj"])
    frames = np.zeros((2, 128, 128, 3), dtype=np.uint8)
    masks = np.zeros((2, 1, 128, 128), dtype=bool)
    masks[:, :, 40:90, 40:90] = True
    dark = routing_maps(model, Video.from_arrays("dark", frames, masks), module=module)
    frames[1, :32, 96:] = 255
    lit = routing_maps(model, Video.from_arrays("lit", frames, masks), module=module)
    changed = np.argwhere(dark.experts[1, 0] != lit.experts[1, 0])
    assert len(changed) and changed[:, 0].mean() < 3.5 < changed[:, 1].mean()


def test_routing_maps_of_the_vision_encoder(everywhere, entering):
    module = next(name for name in everywhere.expert_module_names if name.endswith("blocks.0.mlp.proj_in"))
    maps = routing_maps(everywhere, entering, module=module)
    assert maps.object_ids == [None] and maps.experts.shape == (5, 1, 32, 32) and maps.experts.min() == 0
    for name in everywhere.expert_module_names:
        if ".mlp." not in name:
            with pytest.raises(ValueError, match="tokens are image positions"):
                routing_maps(everywhere, entering, module=name)


def test_routing_pictures_show_the_colours_of_the_experts(nano, entering, tmp_path, monkeypatch):
    maps = routing_maps(nano.model, entering)
    maps.experts[1:, 0, :, :4], maps.experts[1:, 0, :, 4:] = 3, 1
    maps.masks[:] = False
    png, mp4 = maps.save(tmp_path / "maps", object_id=2)
    assert png.stat().st_size > 1000
    video = read_video(mp4)
    assert len(video) == 5 and video.size[0] > 480 and video.size[1] == 2 * 640
    right = video[3][-480:, 640:].astype(float)
    grey = np.repeat(np.array(Image.fromarray(entering.frames[3]).convert("L").resize((640, 480)))[..., None], 3, -1)
    for columns, expert in ((slice(20, 300), 3), (slice(340, 620), 1)):
        expected = (0.3 * grey + 0.7 * rgb(expert))[:, columns].mean(axis=(0, 1))
        np.testing.assert_allclose(right[:, columns].mean(axis=(0, 1)), expected, atol=8)
    # The prompted frame has no map and stays grey.
    unmapped = video[0][-480:, 640:].astype(float)
    assert np.abs(unmapped - unmapped.mean(axis=-1, keepdims=True)).mean() < 3
    with pytest.raises(ValueError, match=r"`object_id` must be one of \[2, 5, 9\], got 4"):
        maps.save(tmp_path / "other", object_id=4)

    def write_some(path, frames, fps):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("samoe_hf.analysis.routing.write_video", write_some)
    with pytest.raises(OSError, match="No space left"):
        maps.save(tmp_path / "other")
    assert sorted(tmp_path.iterdir()) == sorted([png, mp4])
