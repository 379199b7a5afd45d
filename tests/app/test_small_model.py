"""The small model that comes with the package, on the page: a click is answered with the object that was clicked."""

import numpy as np
import pytest

from helpers.app import run_all
from samoe_hf import small_base
from samoe_hf.app.models import load_model
from samoe_hf.app.session import TrackingSession
from samoe_hf.app.uploads import EXAMPLE_FRAMES, EXAMPLE_SIZE, EXAMPLES, Limits, open_example
from samoe_hf.data import SyntheticVideos


@pytest.mark.parametrize("name", ["Shapes", pytest.param("Paper", marks=pytest.mark.slow)])
def test_objects_of_examples_are_found_and_tracked(tmp_path, name):
    """By a click inside of each of its objects, over all frames, and by a box around it on the first one: their IoU."""
    loaded = load_model(small_base(), "cpu", "small model")
    truth = SyntheticVideos(1, EXAMPLE_FRAMES, EXAMPLE_SIZE, domain=name.lower(), seed=EXAMPLES[name])[0]
    ids = np.array(truth.object_ids)[:, None, None]
    for by_box in (False, True):
        session = TrackingSession(tmp_path, open_example(name, tmp_path, Limits()), loaded, Limits())
        for mask in truth.masks(0):
            (ys, xs), object_id = np.nonzero(mask), session.add_object()
            if by_box:
                session.draw_box(object_id, 0, (xs.min(), ys.min(), xs.max(), ys.max()))
            else:
                nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
                session.click(object_id, 0, int(xs[nearest]), int(ys[nearest]))
        if not by_box:
            run_all(session.propagate())
        both = [(session.id_map(t) == ids, truth.masks(t)) for t in range(1 if by_box else EXAMPLE_FRAMES)]
        iou = np.stack([(a & b).sum((1, 2)) / np.maximum((a | b).sum((1, 2)), 1) for a, b in both])
        assert iou[0].mean() > 0.6 and iou.mean() > 0.4, iou.mean(axis=0)
