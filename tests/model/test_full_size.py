"""Meta's eight architectures at full size with random weights: the converted model tracks as `sam2` does.

Needs the `bench` extra, about 5 GB of memory and, on one core, 1 to 4 minutes for each architecture.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam2VideoInferenceSession

from samoe_hf import SamoeModel
from samoe_hf.model.processing_samoe import build_processor

HEIGHT, WIDTH, FRAMES = 360, 640, 3
POINTS, LABELS, BOX = [[250, 180], [560, 40]], [1, 0], [120, 60, 420, 300]


def draw_frames(folder: Path) -> np.ndarray:
    """Writes frames of a textured disc that moves over a textured ground, and returns its first mask."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 255, (2, 18, 32, 3), dtype=np.uint8)
    ground, texture = (np.array(Image.fromarray(noise).resize((WIDTH, HEIGHT))) for noise in coarse)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    masks = []
    for index in range(FRAMES):
        mask = (x - 270 - 25 * index) ** 2 + (y - 180) ** 2 < 110**2
        frame = np.where(mask[..., None], texture, ground)
        Image.fromarray(frame).save(folder / f"{index:05d}.jpg", quality=95)
        masks.append(mask)
    return masks[0]


def build_predictor(name: str) -> torch.nn.Module:
    """`sam2`'s video predictor as its `build_sam2_video_predictor` sets it, but for hole filling, which needs CUDA."""
    sam2 = pytest.importorskip("sam2", reason="needs the `bench` extra")
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(Path(sam2.__file__).parent / "configs" / name.split("_")[0] / f"{name}.yaml").model
    config._target_ = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    config.fill_hole_area = 0
    config.binarize_mask_from_pts_for_mem_enc = True
    config.sam_mask_decoder_extra_args = {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    torch.manual_seed(0)
    return instantiate(config).eval()


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Random weights with which every part of the model shows in the masks; its own leave most parts at zero."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "gamma" or (name == "weight" and parameter.dim() == 1):
                parameter.uniform_(0.5, 1.0)  # layer scales, norms
            elif parameter.dim() == 1:
                parameter.normal_(std=0.1)
            elif name == "weight" and not isinstance(module, torch.nn.Embedding):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.5)  # tokens, positions
    for layer in model.memory_attention.layers:
        layer.cross_attn_image.k_proj.weight *= 2.0  # attention to few memories, not to the mean of all
    model.memory_encoder.mask_downsampler.encoder[-1].weight *= 4.0  # memories of the mask more than of the image
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)  # or most masks would be empty


@torch.inference_mode()
def track_with_sam2(predictor: torch.nn.Module, folder: Path, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns frames (T, 3, S, S) and low-resolution logits (objects, T, S/4, S/4)."""
    state = predictor.init_state(str(folder))
    predictor.add_new_points_or_box(state, 0, obj_id=1, points=POINTS, labels=LABELS)
    predictor.add_new_points_or_box(state, 0, obj_id=2, box=BOX)
    predictor.add_new_mask(state, 0, obj_id=3, mask=mask)
    for _ in predictor.propagate_in_video(state):
        pass
    logits = []
    for outputs in state["output_dict_per_obj"].values():
        by_frame = outputs["cond_frame_outputs"] | outputs["non_cond_frame_outputs"]
        logits.append(torch.cat([by_frame[index]["pred_masks"][:, 0] for index in range(FRAMES)]))
    return state["images"], torch.stack(logits)


def track_with_samoe(model: SamoeModel, pixel_values: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    processor = build_processor(model.config)
    session = Sam2VideoInferenceSession(pixel_values, video_height=HEIGHT, video_width=WIDTH, dtype=torch.float32)
    prompts = [
        {"input_points": [[POINTS]], "input_labels": [[LABELS]]},
        {"input_boxes": [[BOX]]},
        {"input_masks": mask},
    ]
    for obj_id, prompt in enumerate(prompts, start=1):
        processor.add_inputs_to_inference_session(session, frame_idx=0, obj_ids=obj_id, **prompt)
    return torch.stack([output.pred_masks[:, 0] for output in model.propagate_in_video_iterator(session)], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sam2", "sam2.1"])
@pytest.mark.parametrize("size", ["t", "s", "b+", "l"])
def test_converted_models_track_as_sam2_does(tmp_path, family, size, record_property):
    (tmp_path / "frames").mkdir()
    mask = draw_frames(tmp_path / "frames")
    predictor = build_predictor(f"{family}_hiera_{size}")
    draw_weights(predictor)
    torch.save({"model": predictor.state_dict()}, tmp_path / "checkpoint.pt")
    pixel_values, expected = track_with_sam2(predictor, tmp_path / "frames", mask)
    del predictor
    model = SamoeModel.from_pretrained(tmp_path / "checkpoint.pt")
    logits = track_with_samoe(model, pixel_values, mask)
    # The reference must depend on its inputs: on the pixels, and beyond the first frame on the memory of each object.
    assert expected.flatten(2).std(dim=2).min() > 0.1
    assert (expected[0, 1:] - expected[2, 1:]).abs().mean() > 0.05
    difference = (logits - expected).abs().flatten(2).mean(dim=2)
    print(f"{family}_hiera_{size}: mean difference by object and frame {difference.tolist()}")
    record_property("mean_difference", difference.tolist())
    assert difference.max() < 1e-3
