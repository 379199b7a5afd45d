"""What routers put out is observed by frame and object, and drawn over the frames."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam2VideoInferenceSession

from helpers.pictures import rgb
from samoe_hf.analysis.routing import observe_routers, routing_maps
from samoe_hf.analysis.usage import expert_usage
from samoe_hf.data import Video, read_video
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.model.expert_router import top_k_gates
from samoe_hf.model.processing_samoe import build_processor

QUERY = "memory_attention.layers.1.cross_attn_image.q_proj"
FIRST_SELF_ATTENTION = "memory_attention.layers.0.self_attn.q_proj"


def observed(model, video, object_ids, corrected=()):
    """Tracks objects in one session, some clicked on frame 2: (module, frame, object) -> logits of its calls."""
    processor, calls = build_processor(model.config), {}
    pixels = processor.video_processor(videos=np.stack(list(video.frames)), return_tensors="pt").pixel_values_videos[0]
    session = Sam2VideoInferenceSession(
        video=pixels, video_height=video.size[0], video_width=video.size[1], dtype=torch.float32
    )

    def observe(name, rows, logits):
        for row, row_logits in zip(rows, logits, strict=True):
            calls.setdefault((name, *row), []).append(row_logits)

    with observe_routers(model, observe):
        for t in range(len(video)):
            for object_id in object_ids:
                prompt = None
                if t == 0:
                    prompt = {"input_masks": video.masks(len(video) - 1, [object_id])[0]}
                elif t == 2 and object_id in corrected:
                    prompt = {"input_points": [[[[60, 40]]]], "input_labels": [[[1]]]}
                if prompt:
                    processor.add_inputs_to_inference_session(session, t, object_id, **prompt)
            model(session, frame_idx=t)
    return calls


def test_objects_in_several_batches_are_told_apart(nano, entering):
    """An object that was clicked on another frame reads other memories, in a batch of its own behind the others."""
    together = observed(nano.model, entering, (2, 5, 9), corrected=[5])
    assert {object_id for name, _, object_id in together if name == FIRST_SELF_ATTENTION} == {None}
    for object_id in (2, 5, 9):
        alone = observed(nano.model, entering, [object_id], corrected=[5])
        for t in (1, 3, 4):
            for expected, logits in zip(alone[QUERY, t, object_id], together[QUERY, t, object_id], strict=True):
                torch.testing.assert_close(logits, expected, atol=5e-3, rtol=0)
    other = together[QUERY, 3, 9][0] - together[QUERY, 3, 5][0]
    assert other.abs().max() > 0.2


def test_frames_that_are_encoded_ahead_are_told_apart(everywhere, entering):
    module = next(name for name in everywhere.expert_module_names if name.endswith("blocks.0.mlp.proj_in"))
    processor, calls = build_processor(everywhere.config), {}
    pixels = processor.video_processor(videos=np.stack(list(entering.frames)), return_tensors="pt").pixel_values_videos
    session = Sam2VideoInferenceSession(
        video=pixels[0], video_height=96, video_width=128, dtype=torch.float32, max_vision_features_cache_size=5
    )
    processor.add_inputs_to_inference_session(session, 0, 1, input_masks=entering.masks(0, [2])[0])

    def observe(name, rows, logits):
        if name == module:
            calls.update(zip(rows, logits, strict=True))

    with observe_routers(everywhere, observe):
        everywhere(session, frame_idx=0)
    assert list(calls) == [(t, None) for t in range(5)]
    for (t, _), logits in calls.items():
        expected = routing_maps(everywhere, entering, module=module).experts[t, 0]
        assert (logits.argmax(dim=-1).view(32, 32).numpy() == expected).mean() > 0.99


@pytest.mark.slow
def test_compiled_models_are_observed_and_stay_compiled(nano, entering):
    expected = expert_usage(nano.model, [entering], show_progress_bar=False).to_pandas("object")
    model, runs = copy.deepcopy(nano.model), []

    def backend(graph, _):
        runs.append(graph)
        return graph.forward

    model.memory_attention.compile(backend=backend, dynamic=True)
    masks, _ = segment_video(model, build_processor(model.config), entering)
    count = len(runs)
    assert count
    table = expert_usage(model, [entering], show_progress_bar=False).to_pandas("object")
    np.testing.assert_allclose(table.mean_gate, expected.mean_gate, atol=1e-6)
    assert len(runs) == count
    again, _ = segment_video(model, build_processor(model.config), entering)
    assert len(runs) == count and (again == masks).all()


def test_clips_are_not_observed(nano):
    frames = nano.load("train_step")
    labels = frames["masks"].bool().transpose(0, 1)[None, :, :3]
    with observe_routers(nano.model, lambda *_: pytest.fail("a clip has no sessions")):
        nano.model(frames["pixel_values"][None, :3], labels)


def test_the_mode_of_the_model_is_restored_after_an_error(nano):
    nano.model.train()
    try:
        with pytest.raises(KeyError), observe_routers(nano.model, print):
            assert not nano.model.training
            raise KeyError
        assert nano.model.training
    finally:
        nano.model.eval()


def test_routing_maps_hold_the_expert_of_largest_gate(nano, entering):
    seen = {}

    def observe(name, rows, logits):
        if name == QUERY:
            gates = top_k_gates(logits, 2)
            seen.update({tuple(row): gate.argmax(dim=-1).view(8, 8) for row, gate in zip(rows, gates, strict=True)})

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


def test_routing_maps_are_laid_out_as_the_image_is(nano):
    """Only a corner of the image is lit, and the positions that are routed differently must be there."""
    frames = np.zeros((2, 128, 128, 3), dtype=np.uint8)
    masks = np.zeros((2, 1, 128, 128), dtype=bool)
    masks[:, :, 40:90, 40:90] = True
    module = "memory_attention.layers.0.self_attn.q_proj"
    dark = routing_maps(nano.model, Video.from_arrays("dark", frames, masks), module=module)
    frames[1, :32, 96:] = 255
    lit = routing_maps(nano.model, Video.from_arrays("lit", frames, masks), module=module)
    changed = np.argwhere(dark.experts[1, 0] != lit.experts[1, 0])
    assert len(changed) and changed[:, 0].mean() < 3.5 < changed[:, 1].mean()


def test_routing_maps_of_the_vision_encoder(everywhere, entering, tmp_path):
    module = next(name for name in everywhere.expert_module_names if name.endswith("blocks.0.mlp.proj_in"))
    maps = routing_maps(everywhere, entering, module=module)
    assert maps.object_ids == [None] and maps.experts.shape == (5, 1, 32, 32) and maps.experts.min() == 0
    assert all(file.stat().st_size > 1000 for file in maps.save(tmp_path / "maps"))
    for name in everywhere.expert_module_names:
        if ".mlp." not in name:
            with pytest.raises(ValueError, match="tokens are image positions"):
                routing_maps(everywhere, entering, module=name)


def test_routing_pictures_show_the_colours_of_the_experts(nano, entering, tmp_path):
    maps = routing_maps(nano.model, entering)
    maps.experts[1:, 0, :, :4], maps.experts[1:, 0, :, 4:] = 3, 1
    maps.masks[:] = False
    png, mp4 = maps.save(tmp_path / "maps", object_id=2)
    assert png.stat().st_size > 1000
    video = read_video(mp4)
    assert len(video) == 5 and video.size[0] > 480 and video.size[1] == 2 * 640
    right = video[3][:480, 640:].astype(float)
    grey = np.repeat(np.array(Image.fromarray(entering.frames[3]).convert("L").resize((640, 480)))[..., None], 3, -1)
    for columns, expert in ((slice(20, 300), 3), (slice(340, 620), 1)):
        expected = (0.3 * grey + 0.7 * rgb(expert))[:, columns].mean(axis=(0, 1))
        np.testing.assert_allclose(right[:, columns].mean(axis=(0, 1)), expected, atol=8)
    # The prompted frame has no map and stays grey.
    unmapped = video[0][:480, 640:].astype(float)
    assert np.abs(unmapped - unmapped.mean(axis=-1, keepdims=True)).mean() < 3
    with pytest.raises(ValueError, match=r"`object_id` must be one of \[2, 5, 9\], got 4"):
        maps.save(tmp_path / "other", object_id=4)


def test_pictures_that_cannot_all_be_written_are_not_written(nano, entering, tmp_path, monkeypatch):
    maps = routing_maps(nano.model, entering)

    def write_some(path, frames, fps):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("samoe_hf.analysis.routing.write_video", write_some)
    with pytest.raises(OSError, match="No space left"):
        maps.save(tmp_path / "maps")
    assert list(tmp_path.iterdir()) == []
