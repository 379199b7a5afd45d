"""The small model that comes with the page: a click is answered with the object that was clicked."""

import threading

import numpy as np
import pytest
import torch

from click_start import let_points_find_their_place
from helpers.app import run_all
from samoe_hf import SamoeModel, small_base
from samoe_hf.app.models import click_base, load_model
from samoe_hf.app.session import TrackingSession
from samoe_hf.app.uploads import EXAMPLE_FRAMES, EXAMPLE_SIZE, EXAMPLES, Limits, open_kept, write_example
from samoe_hf.data import SyntheticVideos


@pytest.fixture(scope="module")
def click_model():
    return load_model(click_base(), "cpu", "small model")


def track_example(loaded, name, folder, prompt) -> tuple[np.ndarray, np.ndarray]:
    """IoU (objects,) on the first frame, and over all, of an example whose objects are prompted one by one."""
    video = open_kept(name, write_example(name, folder), Limits())
    session = TrackingSession(folder, video, loaded, threading.Lock(), Limits())
    look, seed = EXAMPLES[name]
    truth = SyntheticVideos(1, EXAMPLE_FRAMES, EXAMPLE_SIZE, domain=look, seed=seed)[0]
    for mask in truth.masks(0):
        prompt(session, session.add_object(), mask)
    run_all(session.propagate())
    ids = np.array(truth.object_ids)[:, None, None]
    both = [(session.id_map(t) == ids, truth.masks(t)) for t in range(EXAMPLE_FRAMES)]
    iou = np.stack([(a & b).sum((1, 2)) / np.maximum((a | b).sum((1, 2)), 1) for a, b in both])
    return iou[0], iou.mean(axis=0)


def click_inside(session, object_id, mask):
    ys, xs = np.nonzero(mask)
    nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
    session.click(object_id, 0, int(xs[nearest]), int(ys[nearest]))


def box_around(session, object_id, mask):
    ys, xs = np.nonzero(mask)
    session.draw_box(object_id, 0, (xs.min(), ys.min(), xs.max(), ys.max()))


@pytest.mark.parametrize("prompt", [click_inside, box_around])
@pytest.mark.parametrize("name", ["Shapes", "Paper"])
def test_objects_of_examples_are_found_and_tracked(click_model, tmp_path, name, prompt):
    first, over_time = track_example(click_model, name, tmp_path, prompt)
    print(name, prompt.__name__, first.round(2), over_time.round(2))
    assert first.mean() > 0.6 and over_time.mean() > 0.4


def test_points_find_their_place_in_the_start_of_its_training():
    """The attention from a point to the image is largest where the point is."""
    model = SamoeModel.from_pretrained(small_base()).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    let_points_find_their_place(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("attn_token_to_image" in name and ("q_proj" in name or "k_proj" in name) for name in changed)
    attention = model.mask_decoder.transformer.final_attn_token_to_image
    place = model.get_image_wide_positional_embeddings()[0].flatten(1).T  # (h * w, channels)
    scores = attention.q_proj(place) @ attention.k_proj(place).T
    assert (scores.argmax(dim=1) == torch.arange(len(place))).all()
