"""Random sessions: whatever is done, an object among others gets the masks that it gets alone."""

import numpy as np
import pytest
import torch
from hypothesis.stateful import run_state_machine_as_test
from transformers import Sam2VideoInferenceSession

from helpers.interaction import NUM_FRAMES, SETTINGS, Interaction, Sessions, draw_weights, tiny_config
from samoe_hf import SamoeModel
from samoe_hf.model.processor import build_processor
from samoe_hf.model.session import VideoSession

FRAMES = np.random.default_rng(0).integers(0, 255, (NUM_FRAMES, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tiny():
    """A model in float64 with experts."""
    decoder = {"num_hidden_layers": 1, "mlp_dim": 32}
    model = SamoeModel(tiny_config(num_experts=3, lora_rank=2, mask_decoder_config=decoder)).eval()
    draw_weights(model, with_experts=True)
    return model.double()


class AgainstOneByOne(Interaction):
    tolerance = 1e-12

    def make_trackers(self):
        kind = type(self).sequences % 2
        trackers = [
            Sessions(self.model, self.processor, self.starts[kind]),
            Sessions(self.model, self.processor, self.starts[0], separate=True),
        ]
        return trackers


def test_random_sessions_of_several_objects_are_those_of_each_alone(tiny):
    processor = build_processor(tiny.config)

    def start_plain():
        session = Sam2VideoInferenceSession(pixel_values, 32, 32, dtype=torch.float64)
        session.cache = cache
        return session

    def start_video_session():
        session = VideoSession(FRAMES, processor, keep_frames=16, dtype=torch.float64)
        session.cache = cache
        return session

    cache = Sam2VideoInferenceSession(max_vision_features_cache_size=NUM_FRAMES).cache
    whole = VideoSession(FRAMES, processor, dtype=torch.float64)
    pixel_values = torch.stack([whole.get_frame(t) for t in range(NUM_FRAMES)])
    machine = AgainstOneByOne
    machine.model, machine.processor = tiny, processor
    machine.starts = (start_plain, start_video_session)
    run_state_machine_as_test(machine, settings=SETTINGS)
    print({"sequences": machine.sequences, "steps": machine.steps, "worst": machine.worst})
    assert machine.sequences >= 300 and machine.steps > 900
