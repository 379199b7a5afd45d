"""Random sessions: a state machine that does to several trackers what a user may do, and compares their masks."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor
from transformers import Sam2VideoInferenceSession, Sam2VideoProcessor

from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.model import modeling_samoe, tracking
from samoe_hf.model.session import SessionObject, session_objects
from samoe_hf.model.tracking import start_propagation

NUM_FRAMES = 5
OBJECT_IDS = (0, 7, -3)
FRAME_IDX, OBJECT_ID, SEED = st.integers(0, NUM_FRAMES - 1), st.sampled_from(OBJECT_IDS), st.integers(0, 99)
SETTINGS = settings(
    max_examples=300, stateful_step_count=6, derandomize=True, deadline=None, database=None,
    report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
)  # fmt: skip


def run_rows_one_by_one(monkeypatch) -> None:
    """From now on, objects that could run in a batch are tracked one after the other."""
    run_steps = tracking.run_steps

    def run(model, steps):
        for step in steps:
            for task in step.tasks:
                run_steps(model, [replace(step, tasks=[task])])

    for module in (tracking, modeling_samoe):
        monkeypatch.setattr(module, "run_steps", run)


def tiny_config(image_size: int = 32, **settings) -> SamoeConfig:
    """About the smallest model that can be built; `sam2` needs the decoder's and the memory fuser's usual widths."""
    sizes = [[image_size // stride] * 2 for stride in (4, 8, 16)]
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1,
        "image_size": [image_size, image_size], "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 2, 4, 8],
        "global_attention_blocks": [3], "window_positional_embedding_background_size": sizes[2],
    }  # fmt: skip
    decoder = settings.pop("mask_decoder_config", {})
    return SamoeConfig(
        image_size=image_size,
        vision_config={
            "model_type": "sam2_vision_model", "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": sizes, "fpn_hidden_size": 128,
        },
        prompt_encoder_config={"hidden_size": 128, "image_size": image_size},
        mask_decoder_config={"hidden_size": 128, **decoder},
        memory_attention_hidden_size=128,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=sizes[2],
        memory_encoder_hidden_size=128,
        mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128,
        **{"memory_fuser_num_layers": 1, "memory_fuser_intermediate_dim": 512, **settings},
    )  # fmt: skip


@torch.no_grad()
def draw_weights(model: SamoeModel, with_experts: bool, seed: int = 0) -> None:
    """Random weights with which prompts, memories, pointers and, if wanted, experts all show in the masks."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B") and not with_experts:
            parameter.zero_()
        elif parameter.dim() == 1:
            is_scale = name.endswith(("weight", "scale"))
            parameter.uniform_(0.5, 1.0, generator=generator) if is_scale else parameter.normal_(
                std=0.1, generator=generator
            )
        elif "proj" not in name and ("embed" in name or "token" in name or "no_" in name):
            parameter.normal_(std=0.5, generator=generator)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    # Clicks on clicks would amplify rounding: in float64 the same model would give other masks.
    model.prompt_encoder.mask_embed.conv3.weight *= 0.3
    model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(5.0)  # or most masks would be empty
    image_embedding, point_embedding = model.shared_image_embedding, model.prompt_encoder.shared_embedding
    point_embedding.positional_embedding.copy_(image_embedding.positional_embedding.normal_(generator=generator))


class Sessions:
    """Objects in one session, or each in one of its own.

    Args:
        start: starts a session.
        separate: whether each object has a session of its own.
    """

    def __init__(self, model: SamoeModel, processor: Sam2VideoProcessor, start, separate: bool = False):
        self.model, self.processor, self.start, self.separate = model, processor, start, separate
        self.sessions: dict[int | None, Sam2VideoInferenceSession] = {}
        # Of separate objects: frames on which they would be shown beside another object's prompt, in order. `is_exact`
        # tells whether this can be repeated: not if the object was prompted since.
        self.shown: dict[int, list[int]] = {}
        self.is_exact = True

    def _session(self, object_id: int) -> Sam2VideoInferenceSession:
        key = object_id if self.separate else None
        if key not in self.sessions:
            self.sessions[key] = self.start()
        return self.sessions[key]

    def add(self, frame_idx: int, object_id: int, inputs: dict) -> Tensor:
        """Gives a prompt and returns the object's mask (1, S / 4, S / 4)."""
        session = self._session(object_id)
        self._note_shown(frame_idx, object_id)
        self.processor.add_inputs_to_inference_session(session, frame_idx, object_id, **inputs)
        output = self.model(session, frame_idx=frame_idx)
        return output.pred_masks[output.object_ids.index(object_id)]

    def _note_shown(self, frame_idx: int, prompted: int) -> None:
        self.is_exact &= not self.shown.get(prompted)
        others = [i for i in self.sessions if i != prompted] if self.separate else []
        for object_id in others:
            one, frames = SessionObject(self.sessions[object_id], 0), self.shown.setdefault(object_id, [])
            is_new = frame_idx not in frames and one.output(frame_idx) is None
            if is_new and one.bank_after_commit().conditioning:
                frames.append(frame_idx)

    def step(self, frame_idx: int, reverse: bool) -> dict[int, Tensor]:
        """Tracks a frame by a single call."""
        for object_id, frames in self.shown.items():
            for shown in frames:
                self.model(self.sessions[object_id], frame_idx=shown)
        self._forget_shown()
        outputs = [self.model(session, frame_idx=frame_idx, reverse=reverse) for session in self.sessions.values()]
        return {i: mask for output in outputs for i, mask in zip(output.object_ids, output.pred_masks, strict=True)}

    def can_step(self) -> bool:
        objects = [one for session in self.sessions.values() for one in session_objects(session)]
        return self.is_exact and all(one.bank_after_commit().conditioning for one in objects)

    def _forget_shown(self) -> None:
        self.shown, self.is_exact = {}, True

    def clear(self, frame_idx: int, object_id: int) -> None:
        self.is_exact &= not self.shown.get(object_id)
        self.model.clear_prompts(self._session(object_id), frame_idx, object_id)

    def propagate(self, start: int | None, count: int | None, reverse: bool) -> dict[int, Tensor]:
        """Object -> its masks (T, 1, S / 4, S / 4) on the frames that were tracked."""
        self._forget_shown()
        if len(self.sessions) > 1:
            for session in self.sessions.values():  # nothing is propagated unless all can be
                for step in start_propagation(self.model, session, start):
                    self.model(steps=[step])
        masks = {}
        for session in self.sessions.values():
            outputs = list(self.model.propagate_in_video_iterator(session, start, count, reverse))
            for row, object_id in enumerate(session.obj_ids):
                masks[object_id] = torch.stack([output.pred_masks[row] for output in outputs] or [torch.zeros(1)])
        return masks

    def remove(self, object_id: int) -> None:
        self.model.remove_object(self._session(object_id), object_id)
        if self.separate:
            del self.sessions[object_id]
            self.shown.pop(object_id, None)

    def reset(self) -> None:
        self._forget_shown()
        for session in self.sessions.values():
            session.reset_tracking_data()
        if self.separate:
            self.sessions.clear()


class Interaction(RuleBasedStateMachine):
    """What a user may do. Subclasses name the `trackers`, which must agree within `tolerance` on average."""

    image_size, tolerance = 32, 0.0
    sequences, steps, worst = 0, 0, 0.0  # so far

    def make_trackers(self) -> list:
        raise NotImplementedError

    @initialize(data=st.data())
    def begin(self, data) -> None:
        type(self).sequences += 1
        self.trackers = self.make_trackers()
        self.objects: dict[int, set[int]] = {}  # object -> frames with a prompt

    def compare(self, results: list) -> None:
        type(self).steps += 1
        first, *others = results
        for other in others:
            assert first.keys() == other.keys()
            for key, mask in first.items():
                assert mask.shape == other[key].shape
                difference = (mask.double() - other[key].double()).abs().mean().item()
                type(self).worst = max(self.worst, difference)
                assert difference <= self.tolerance, f"object {key} differs by {difference}"

    def attempt(self, action) -> list | None:
        """What each tracker gives; None if all refuse."""
        results, errors = [], []
        for tracker in self.trackers:
            try:
                results.append(action(tracker))
            except (ValueError, RuntimeError) as error:
                errors.append(error)
        assert not errors or not results, errors
        return results or None

    def give(self, frame_idx: int, object_id: int, inputs: dict) -> None:
        self.objects.setdefault(object_id, set()).add(frame_idx)
        self.compare([{object_id: tracker.add(frame_idx, object_id, inputs)} for tracker in self.trackers])

    @rule(frame_idx=FRAME_IDX, object_id=OBJECT_ID, seed=SEED, count=st.integers(1, 3), clear=st.booleans())
    def add_points(self, frame_idx, object_id, seed, count, clear) -> None:
        rng = np.random.default_rng(seed)
        points = rng.integers(0, self.image_size, (count, 2)).tolist()
        labels = rng.integers(0, 2, count).tolist()
        inputs = {"input_points": [[points]], "input_labels": [[labels]], "clear_old_inputs": clear}
        self.give(frame_idx, object_id, inputs)

    @rule(frame_idx=FRAME_IDX, object_id=OBJECT_ID, seed=SEED)
    def add_box(self, frame_idx, object_id, seed) -> None:
        corners = np.random.default_rng(seed).integers(0, self.image_size, (2, 2))
        box = [*corners.min(axis=0).tolist(), *(corners.max(axis=0) + 1).tolist()]
        self.give(frame_idx, object_id, {"input_boxes": [[box]]})

    @rule(frame_idx=FRAME_IDX, object_id=OBJECT_ID, seed=SEED)
    def add_mask(self, frame_idx, object_id, seed) -> None:
        mask = np.zeros((self.image_size, self.image_size), dtype=bool)
        top, left = np.random.default_rng(seed).integers(0, self.image_size // 2, 2)
        mask[top : top + self.image_size // 3, left : left + self.image_size // 2] = True
        self.give(frame_idx, object_id, {"input_masks": mask})

    @precondition(lambda self: any(self.objects.values()))
    @rule(data=st.data())
    def clear(self, data) -> None:
        object_id = data.draw(st.sampled_from([i for i, frames in self.objects.items() if frames]))
        frame_idx = data.draw(st.sampled_from(sorted(self.objects[object_id])))
        self.objects[object_id].remove(frame_idx)
        for tracker in self.trackers:
            tracker.clear(frame_idx, object_id)

    @precondition(lambda self: self.objects)
    @rule(start=FRAME_IDX, count=st.sampled_from([0, 1, 2, None]), reverse=st.booleans())
    def propagate(self, start, count, reverse) -> None:
        results = self.attempt(lambda tracker: tracker.propagate(start, count, reverse))
        if results is not None:
            self.compare(results)

    @precondition(lambda self: self.objects)
    @rule(data=st.data())
    def remove(self, data) -> None:
        object_id = data.draw(st.sampled_from(list(self.objects)))
        del self.objects[object_id]
        for tracker in self.trackers:
            tracker.remove(object_id)

    @precondition(lambda self: self.objects)
    @rule(often=st.integers(0, 3))
    def reset(self, often) -> None:
        if often == 0:
            self.objects.clear()
            for tracker in self.trackers:
                tracker.reset()
