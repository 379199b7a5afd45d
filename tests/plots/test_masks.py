"""Masks over frames."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_cdt

from samoe_hf.data.video_io import voc_palette
from samoe_hf.plots.masks import outline, overlay_masks, plot_frames


def test_objects_have_the_colours_of_davis_whatever_their_ids():
    frame = np.full((8, 8, 3), 100, np.uint8)
    ids = np.zeros((8, 8), np.int32)
    ids[0], ids[1], ids[2] = 1, 255, 256
    shown = overlay_masks(frame, ids, alpha=1.0)
    palette = voc_palette()
    assert (shown[0] == palette[1]).all() and (shown[1] == palette[255]).all() and (shown[3:] == 100).all()
    assert (shown[2] == palette[1]).all()  # colours begin anew; black would hide the object
    assert overlay_masks(frame, ids * 0) is frame


@pytest.mark.parametrize("thickness", [1, 3])
def test_an_outline_lies_on_both_sides_of_the_edge_and_not_along_the_border(thickness):
    mask = np.zeros((20, 30), bool)
    mask[5:, 8:20] = True
    inside, outside = (distance_transform_cdt(side, "chessboard") for side in (np.pad(mask, 1, mode="edge"), ~mask))
    expected = ((inside[1:-1, 1:-1] > 0) & (inside[1:-1, 1:-1] <= thickness)) | ((outside > 0) & (outside <= thickness))
    np.testing.assert_array_equal(outline(mask, thickness)[:-thickness], expected[:-thickness])
    assert not outline(np.ones((4, 4), bool), thickness).any() and not outline(np.zeros((4, 4), bool), thickness).any()


def test_frames_side_by_side_have_their_names(tmp_path):
    frames = [np.zeros((4, 6, 3), np.uint8)] * 2
    plot_frames({"a$b$": frames, "_c": frames}, ["x", "y"], tmp_path / "grid.png", "title")
    assert (tmp_path / "grid.png").stat().st_size > 1000
