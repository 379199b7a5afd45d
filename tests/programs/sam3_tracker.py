# /// script
# dependencies = ["sam3==0.1.4", "psutil", "safetensors", "scipy"]
# ///
"""What Meta's own code of SAM 3's tracker gives for the clip of `tests/helpers/sam3_clip.py`.

uv run tests/programs/sam3_tracker.py tests/fixtures/sam3_tracker.safetensors

It runs in an environment of its own, which uv makes, and needs no GPU. The file holds of each object, tracked alone
with memory selection: mask logits (frames, 16, 16), object scores and estimated IoUs (frames,). The tracker is as the
package's `build_tracker` builds it, but narrow; and maps are 16 times smaller than images, not 14 times: then nothing
is resized. All is computed in float64, since rounding of float32 now and then tips that of memories to bfloat16.

"combined" is the same of a tracker behind a small image encoder, with the encoder's features of the first frame. Names
and shapes of its tensors are in the file's metadata, as JSON, and those of the published `sam3.pt`.
"""
# ruff: noqa: E402

import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from safetensors.torch import save_file

for name in ("cuda", "pin_memory"):
    setattr(torch.Tensor, name, lambda tensor, **_: tensor)
SINGLE = torch.float32
torch.Tensor.float, torch.float, torch.float32 = torch.Tensor.double, torch.float64, torch.float64

from sam3 import model_builder
from sam3.model import sam3_tracker_base
from sam3.model.decoder import TransformerDecoderLayerv2, TransformerEncoderCrossAttention
from sam3.model.memory import CXBlock, SimpleFuser, SimpleMaskDownSampler, SimpleMaskEncoder
from sam3.model.model_misc import TransformerWrapper
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.vitdet import ViT
from sam3.model.vl_combiner import SAM3VLBackbone
from sam3.sam.transformer import RoPEAttention

sys.path.append(str(Path(__file__).parents[1]))
from helpers.sam3_clip import (
    FEED_FORWARD,
    HIDDEN,
    MEMORY,
    NUM_FRAMES,
    PASSES,
    PROMPTS,
    SIZE,
    STRIDE,
    draw,
    draw_features,
    draw_weight,
)


def build() -> Sam3TrackerPredictor:
    side = SIZE // STRIDE
    attention = partial(
        RoPEAttention, embedding_dim=HIDDEN, num_heads=1, downsample_rate=1, dropout=0.1, feat_sizes=[side, side]
    )
    layer = TransformerDecoderLayerv2(
        cross_attention_first=False, activation="relu", dim_feedforward=FEED_FORWARD, dropout=0.1,
        pos_enc_at_attn=False, pre_norm=True, d_model=HIDDEN, pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False, self_attention=attention(),
        cross_attention=attention(kv_in_dim=MEMORY, rope_k_repeat=True),
    )  # fmt: skip
    encoder = TransformerEncoderCrossAttention(
        d_model=HIDDEN, frozen=False, pos_enc_at_input=True, layer=layer, num_layers=2, batch_first=True
    )
    memory_encoder = SimpleMaskEncoder(
        out_dim=MEMORY, in_dim=HIDDEN, position_encoding=PositionEmbeddingSine(MEMORY),
        mask_downsampler=SimpleMaskDownSampler(
            embed_dim=HIDDEN, kernel_size=3, stride=2, padding=1, interpol_size=[SIZE, SIZE]
        ),
        fuser=SimpleFuser(CXBlock(HIDDEN), num_layers=2),
    )  # fmt: skip
    # The tracker asks for a mask decoder of the published width.
    transformer, decoder = sam3_tracker_base.TwoWayTransformer, sam3_tracker_base.MaskDecoder
    sam3_tracker_base.TwoWayTransformer = lambda **own: transformer(**{**own, "mlp_dim": FEED_FORWARD})
    sam3_tracker_base.MaskDecoder = lambda **own: decoder(**{**own, "iou_head_hidden_dim": FEED_FORWARD})
    return Sam3TrackerPredictor(
        image_size=SIZE, backbone_stride=STRIDE, num_maskmem=7, backbone=None,
        transformer=TransformerWrapper(encoder=encoder, decoder=None, d_model=HIDDEN), maskmem_backbone=memory_encoder,
        multimask_output_in_sam=True, forward_backbone_per_frame_for_eval=True, multimask_output_for_tracking=True,
        multimask_min_pt_num=0, multimask_max_pt_num=1, non_overlap_masks_for_output=False, max_cond_frames_in_attn=4,
        sam_mask_decoder_extra_args={
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
        clear_non_cond_mem_around_input=True, use_memory_selection=True,
    )  # fmt: skip


def add_prompt(model: Sam3TrackerPredictor, state: dict, frame_idx: int, prompt: dict) -> None:
    if "mask" in prompt:
        left, top, right, bottom = prompt["mask"]
        mask = torch.zeros(SIZE, SIZE)
        mask[top:bottom, left:right] = 1
        model.add_new_mask(state, frame_idx, 1, mask)
        return
    given = {name: torch.tensor(value, dtype=torch.float64) / SIZE for name, value in prompt.items()}
    if "point" in given:
        given = {"points": given["point"][None], "labels": torch.ones(1, dtype=torch.int32)}
    model.add_new_points_or_box(state, frame_idx, 1, **given)


def track(
    model: Sam3TrackerPredictor, features: list[torch.Tensor], prompts: dict, passes: tuple[bool, bool]
) -> dict[str, torch.Tensor]:
    positions = [PositionEmbeddingSine(level.shape[1])(level[:1]) for level in features]
    cached = {
        t: (
            torch.zeros(1, 3, SIZE, SIZE),
            {"backbone_fpn": [level[t : t + 1] for level in features], "vision_pos_enc": positions},
        )
        for t in range(NUM_FRAMES)
    }
    state = model.init_state(SIZE, SIZE, NUM_FRAMES, cached_features=cached, offload_state_to_cpu=True)
    for frame_idx, prompt in prompts.items():
        add_prompt(model, state, frame_idx, prompt)
    model.propagate_in_video_preflight(state)
    for reverse in passes:
        list(model.propagate_in_video(state, min(prompts), NUM_FRAMES, reverse, tqdm_disable=True))
    outputs = {**state["output_dict"]["non_cond_frame_outputs"], **state["output_dict"]["cond_frame_outputs"]}
    names = {"masks": "pred_masks", "scores": "object_score_logits", "ious": "iou_score"}
    return {
        part: torch.stack([outputs[t][name].squeeze() for t in range(NUM_FRAMES)]).to(SINGLE)
        for part, name in names.items()
    }


def build_combined() -> torch.nn.Module:
    """The detector's image encoder with both necks, and the tracker, under the names that `sam3.pt` has for them."""
    trunk = ViT(
        img_size=SIZE, pretrain_img_size=2 * STRIDE, patch_size=STRIDE, embed_dim=64, depth=4, num_heads=2,
        mlp_ratio=2.5, norm_layer="LayerNorm", tile_abs_pos=True, global_att_blocks=(1, 3), rel_pos_blocks=(),
        use_rope=True, use_interp_rope=True, window_size=2, retain_cls_token=False, ln_pre=True,
        return_interm_layers=False, bias_patch_embed=False,
    )  # fmt: skip
    neck = Sam3DualViTDetNeck(trunk, PositionEmbeddingSine(HIDDEN), HIDDEN, add_sam2_neck=True)
    combined = torch.nn.Module()
    combined.detector = torch.nn.Module()
    combined.detector.backbone = SAM3VLBackbone(neck, torch.nn.Linear(8, HIDDEN), scalp=1)
    combined.tracker = build()
    return combined


def shapes_of(model: torch.nn.Module) -> str:
    return json.dumps({name: list(tensor.shape) for name, tensor in model.state_dict().items()})


@torch.inference_mode()
def track_combined() -> tuple[dict[str, torch.Tensor], str]:
    combined = build_combined().eval().double()
    for name, tensor in combined.state_dict().items():
        if not name.endswith("freqs_cis"):
            tensor.copy_(torch.from_numpy(draw_weight(name, tensor.shape)).to(SINGLE))
    frames = torch.from_numpy(draw("frames", (NUM_FRAMES, 3, SIZE, SIZE))).to(SINGLE).double()
    features = combined.detector.backbone.forward_image(frames)["sam2_backbone_out"]["backbone_fpn"]
    features[:2] = [getattr(combined.tracker.sam_mask_decoder, f"conv_s{i}")(features[i]) for i in range(2)]
    results = track(combined.tracker, features, PROMPTS["point"], (False,))
    levels = {f"level {i}": level[0].to(SINGLE).contiguous() for i, level in enumerate(features)}
    return results | levels, shapes_of(combined)


def published() -> str:
    """Names and shapes of `sam3.pt`, of all that the tracker and the image encoder read."""
    model_builder.PositionEmbeddingSine = lambda precompute_resolution=None, **own: PositionEmbeddingSine(**own)
    torch.linspace = partial(torch.linspace, device="cpu")  # its values are read
    with torch.device("meta"):
        return shapes_of(model_builder.build_tracker(True, with_backbone=True))


published_shapes = published()  # before `build` narrows the mask decoder
model = build().eval().double()
for name, tensor in model.state_dict().items():
    tensor.copy_(torch.from_numpy(draw_weight(name, tensor.shape)))
features = [torch.from_numpy(level) for level in draw_features()]
results = {name: track(model, features, PROMPTS[prompts], passes) for name, (prompts, passes) in PASSES.items()}
results["combined"], shapes = track_combined()
tensors = {f"{name}.{part}": x for name, parts in results.items() for part, x in parts.items()}
save_file(tensors, sys.argv[1], metadata={"combined": shapes, "published": published_shapes})
