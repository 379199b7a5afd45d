"""EdgeTAM as a base: the same numbers and gradients as transformers' model, and from its files."""

import pytest
import torch
from torch import nn
from transformers import EdgeTamVideoInferenceSession, EdgeTamVideoModel

from helpers.edgetam import edgetam_model, edgetam_peer, needs_timm
from helpers.prompted import PROMPTS, OriginalsMasks, frames, track
from helpers.reference import assert_same_tensors
from samoe_hf import SamoeModel
from samoe_hf.model.processing_samoe import build_processor

pytestmark = needs_timm


class WithOriginalsMasks(OriginalsMasks, EdgeTamVideoModel):
    """transformers' model, which takes masks as the original does."""


@pytest.fixture(scope="module")
def ours():
    """In float64: with these weights a rounding of float32 may tip the choice among masks, and shows."""
    return edgetam_model().double()


@pytest.fixture(scope="module")
def theirs(ours):
    return edgetam_peer(ours, WithOriginalsMasks)


@pytest.fixture(scope="module")
def processor(ours):
    return build_processor(ours.config)


@pytest.mark.parametrize(
    ("prompt", "start", "reverse"),
    [("point", 0, False), ("objects", 0, False), ("objects", 4, True), ("box and click", 3, False), ("mask", 7, True)],
)
def test_masks_are_those_of_transformers(ours, theirs, processor, prompt, start, reverse):
    """Also those of a further click. Masks are taken by SAM 2's rules, as of the other bases."""
    click = [60, 40] if prompt == "point" else None
    prompts = PROMPTS[prompt], start, reverse, click, torch.float64
    masks, expected = (track(x, processor, *prompts) for x in (ours, theirs))
    # transformers rotates queries and keys in float32, and a mask is resized so.
    assert (masks - expected).abs().mean() < (1e-6 if prompt == "mask" else 1e-7)
    assert prompt == "mask" or (masks - expected)[0].abs().mean() < 1e-10  # without memories
    assert (expected[-1] - expected[-2]).abs().mean() > 0.1  # of two frames
    assert click is None or (masks[1] - masks[0]).abs().mean() > 1e-4


def test_sessions_of_transformers_edgetam_are_taken(ours, processor):
    session = processor.init_video_session(video=frames(), dtype=torch.float64)
    pixel_values = torch.stack([*session.processed_frames.values()])
    size = session.video_height, session.video_width
    own = EdgeTamVideoInferenceSession(pixel_values, *size, dtype=torch.float64)
    for one in (session, own):
        processor.add_inputs_to_inference_session(one, 0, 1, **PROMPTS["point"])
    assert torch.equal(ours(own, 0).pred_masks, ours(session, 0).pred_masks)


def test_in_float32_they_differ_by_rounding(processor):
    torch.manual_seed(0)
    model = SamoeModel(edgetam_model().config).eval()  # weights as they are drawn for training
    model.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(5.0)  # or masks would be empty
    masks, expected = (track(x, processor, PROMPTS["objects"]) for x in (model, edgetam_peer(model)))
    assert (masks - expected).abs().mean() < 1e-5


def reference_masks(model, session, num_frames):
    """Masks (objects, frames, S / 4, S / 4) with their gradients, frame by frame and object by object."""
    masks = []
    for index in range(session.get_obj_num()):
        for t in range(num_frames):
            points = session.point_inputs_per_obj[index].get(t)
            arguments = {"inference_session": session, "frame_idx": t, "obj_idx": index, "batch_size": 1}
            output = model._run_single_frame_inference(
                **arguments, is_init_cond_frame=t == 0, point_inputs=points, mask_inputs=None, reverse=False,
                run_mem_encoder=True,
            )  # fmt: skip
            session.store_output(index, t, output_value=output, is_conditioning_frame=t == 0)
            masks.append(output["pred_masks"][0, 0])
    return torch.stack(masks).unflatten(0, (-1, num_frames))


def test_gradients_are_those_of_transformers_modules(processor):
    """Of all parameters, over three frames of two objects, in training mode."""
    ours = edgetam_model().double()
    theirs = edgetam_peer(ours)
    ours.set_trainable("all")
    ours.train(), theirs.train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    session = processor.init_video_session(video=frames(3), dtype=torch.float64)
    prompt = {"input_points": [[[[20, 30]], [[60, 30]]]], "input_labels": [[[1], [1]]]}
    processor.add_inputs_to_inference_session(session, 0, [1, 2], **prompt)
    given = [session.point_inputs_per_obj[index][0] for index in range(2)]
    points, labels = (torch.cat([x[name] for x in given], dim=1) for name in ("point_coords", "point_labels"))
    pixels = torch.stack([session.get_frame(t) for t in range(3)])[None]
    masks = ours(pixels, input_points=points, input_labels=labels).pred_masks[0]
    expected = reference_masks(theirs, session, 3)
    torch.testing.assert_close(masks[:, 0], expected[:, 0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(masks, expected, atol=1e-6, rtol=1e-6)  # transformers rotates keys in float32
    weights = torch.randn(masks.shape, generator=torch.Generator().manual_seed(0), dtype=masks.dtype)
    for output in (masks, expected):
        (output * weights).sum().backward()
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            # Some gradients are zero but for rounding.
            error = (own[name].grad - parameter.grad).norm()
            assert error < 1e-5 * parameter.grad.norm() + 1e-9, name
    learned = {name.split(".")[0] for name, p in theirs.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"vision_encoder", "memory_attention", "memory_encoder", "spatial_perceiver", "mask_decoder"} <= learned


def test_in_float64_it_is_saved_with_the_counts_of_its_norms_and_loaded(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    assert_same_tensors(SamoeModel.from_pretrained(tmp_path, dtype=torch.float64), ours)


def test_batch_norms_keep_their_statistics_in_training():
    model = edgetam_model()
    model.set_trainable("all")
    before = {name: x.clone() for name, x in model.named_buffers() if "running" in name}
    frames = torch.randn(1, 2, 3, 128, 128)
    with torch.no_grad():
        alone = model.get_image_features(frames[0, :1]).fpn_hidden_states
        model.train()
        both = model.get_image_features(frames[0]).fpn_hidden_states
    assert all(torch.allclose(a, b[:, :1], atol=1e-5) for a, b in zip(alone, both, strict=True))
    masks = torch.zeros(1, 1, 2, 128, 128, dtype=torch.bool)
    masks[..., 20:60, 20:60] = True
    model(frames, masks).loss.backward()
    assert model.vision_encoder.backbone.timm_model.stem.conv1.bn.weight.grad.any()
    assert before and all(torch.equal(x, model.get_buffer(name)) for name, x in before.items())
