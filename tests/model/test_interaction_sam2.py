"""Random sessions are those of `sam2`: prompts on any frames, corrections, clearing, partial propagation, removal."""

import pytest
import torch
from hypothesis import assume, settings
from hypothesis.stateful import run_state_machine_as_test
from torch.nn.functional import interpolate
from transformers import Sam2VideoInferenceSession

from helpers.interaction import NUM_FRAMES, SETTINGS, Interaction, Sessions, draw_weights, tiny_config
from samoe_hf import SamoeModel
from samoe_hf.model.processing_samoe import build_processor


class Sam2:
    """`sam2`'s predictor as a tracker; image features of all frames are computed once."""

    def __init__(self, predictor, frames, features):
        self.predictor, self.frames = predictor, frames
        size = frames.shape[-1]
        self.state = {
            "images": frames, "num_frames": len(frames), "offload_video_to_cpu": False, "offload_state_to_cpu": False,
            "video_height": size, "video_width": size, "device": frames.device, "storage_device": frames.device,
            "cached_features": dict(features), "constants": {}, "obj_id_to_idx": {}, "obj_idx_to_id": {},
            "obj_ids": [],
        }  # fmt: skip
        for name in ("point_inputs", "mask_inputs", "output_dict", "temp_output_dict", "frames_tracked"):
            self.state[f"{name}_per_obj"] = {}

    def add(self, frame_idx, object_id, inputs):
        if "input_masks" in inputs:
            self.predictor.add_new_mask(self.state, frame_idx, object_id, inputs["input_masks"])
        elif "input_boxes" in inputs:
            self.predictor.add_new_points_or_box(self.state, frame_idx, object_id, box=inputs["input_boxes"][0][0])
        else:
            points, labels = inputs["input_points"][0][0], inputs["input_labels"][0][0]
            clear = inputs["clear_old_inputs"]
            self.predictor.add_new_points_or_box(
                self.state, frame_idx, object_id, points, labels, clear_old_points=clear
            )
        row = self.state["obj_id_to_idx"][object_id]
        outputs = self.state["temp_output_dict_per_obj"][row]
        is_conditioning = frame_idx not in self.state["frames_tracked_per_obj"][row]
        key = "cond_frame_outputs" if is_conditioning else "non_cond_frame_outputs"
        return outputs[key][frame_idx]["pred_masks"][0]

    def clear(self, frame_idx, object_id):
        self.predictor.clear_all_prompts_in_frame(self.state, frame_idx, object_id)

    def propagate(self, start, count, reverse):
        masks = {object_id: [] for object_id in self.state["obj_ids"]}
        for frame_idx, object_ids, _ in self.predictor.propagate_in_video(self.state, start, count, reverse):
            for object_id in object_ids:
                outputs = self.state["output_dict_per_obj"][self.state["obj_id_to_idx"][object_id]]
                by_frame = outputs["non_cond_frame_outputs"] | outputs["cond_frame_outputs"]
                masks[object_id].append(by_frame[frame_idx]["pred_masks"][0])
        return {object_id: torch.stack(of_object or [torch.zeros(1)]) for object_id, of_object in masks.items()}

    def remove(self, object_id):
        self.predictor.remove_object(self.state, object_id)

    def reset(self):
        self.predictor.reset_state(self.state)


def cast_memory(module, args, kwargs):
    """Without an object pointer to read, `sam2` leaves memories in bfloat16, which needs its autocast."""
    return args, kwargs | {"memory": kwargs["memory"].float()}


class AgainstSam2(Interaction):
    tolerance = 1e-3

    def make_trackers(self):
        return [Sam2(self.predictor, self.frames, self.features), Sessions(self.model, self.processor, self.start)]

    def compare(self, results):
        super().compare(results)
        size = (self.image_size, self.image_size)
        for masks in results[0].values():  # memories are of binary masks: a pixel at 0 falls to either side by rounding
            low = masks.reshape(-1, 1, *masks.shape[-2:]) if masks.ndim > 2 else masks.new_ones(1, 1, 1, 1)
            assume(interpolate(low, size, mode="bilinear").abs().min() > 1e-5)

    def give(self, frame_idx, object_id, inputs):
        state = self.trackers[0].state
        row = state["obj_id_to_idx"].get(object_id)
        is_tracked = row is not None and frame_idx in state["frames_tracked_per_obj"][row]
        if is_tracked and not state["output_dict_per_obj"][row]["cond_frame_outputs"]:
            return  # all prompts were cleared: `sam2` fails here, or when it goes on; we start anew
        super().give(frame_idx, object_id, inputs)

    @classmethod
    def start(cls):
        size = cls.image_size
        session = Sam2VideoInferenceSession(cls.frames, size, size, dtype=torch.float32)
        session.cache = cls.cache
        return session


@pytest.mark.slow
def test_random_sessions_are_those_of_sam2(record_property):
    pytest.importorskip("sam2", reason="needs the `bench` extra")
    from peers import sam2_of

    model = SamoeModel(tiny_config(num_experts=1, num_experts_per_tok=1)).eval()
    draw_weights(model, with_experts=False)
    machine = AgainstSam2
    machine.model, machine.processor, machine.predictor = model, build_processor(model.config), sam2_of(model)
    machine.predictor.memory_attention.register_forward_pre_hook(cast_memory, with_kwargs=True)
    machine.frames = torch.randn(NUM_FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        frames = machine.frames.unsqueeze(1)
        machine.features = {t: (frame, machine.predictor.forward_image(frame)) for t, frame in enumerate(frames)}
    machine.cache = Sam2VideoInferenceSession(max_vision_features_cache_size=NUM_FRAMES).cache
    run_state_machine_as_test(machine, settings=settings(SETTINGS, stateful_step_count=15))
    figures = {"sequences": machine.sequences, "steps": machine.steps, "worst": machine.worst}
    print(figures)
    record_property("figures", figures)
    assert machine.sequences >= 300 and machine.steps > 1500
