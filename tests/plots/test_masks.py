"""Masks over frames: seen on any frame, and told apart by everybody."""

import itertools
import warnings

import numpy as np
import pytest

from samoe_hf.plots.masks import OBJECT_COLORS, object_color, overlay_masks, plot_sheet

# Deuteranopia, from linear RGB to linear RGB (Machado, Oliveira and Fernandes, 2009).
DEUTERANOPIA = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def lab(colors: np.ndarray, blindness: np.ndarray | None = None) -> np.ndarray:
    """sRGB (…, 3), 0 to 255, in CIELAB, in which a distance of 10 is seen at a glance."""
    linear = np.where(colors / 255 <= 0.04045, colors / 255 / 12.92, ((colors / 255 + 0.055) / 1.055) ** 2.4)
    if blindness is not None:
        linear = np.clip(linear @ blindness.T, 0, 1)
    x, y, z = np.moveaxis(np.cbrt(linear @ XYZ.T / WHITE), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def square(size: int = 60, object_id: int = 1) -> np.ndarray:
    ids = np.zeros((size, size), np.int32)
    ids[15:45, 15:45] = object_id
    return ids


@pytest.mark.parametrize("color", [*OBJECT_COLORS, (0, 0, 0), (255, 255, 255), (128, 128, 128)])
@pytest.mark.parametrize("object_id", [1, 8])
def test_an_object_is_seen_on_a_frame_of_any_colour_its_own_too(color, object_id):
    """All along its edge and inside it, pixels are clearly unlike the frame."""
    frame = np.full((60, 60, 3), color, np.uint8)
    shown = overlay_masks(frame, square(object_id=object_id), show_ids=False)
    unlike = np.linalg.norm(lab(shown.astype(float)) - lab(frame.astype(float)), axis=-1) > 15
    for side in np.arange(15, 45):
        for near in (np.s_[side, 13:18], np.s_[side, 42:47], np.s_[13:18, side], np.s_[42:47, side]):
            assert unlike[near].any()
    assert unlike[22:38, 22:38].mean() > 0.15  # hatching
    assert (shown[:14, :] == color).all() and (shown[:, 46:] == color).all()


def test_an_outline_is_black_outside_and_white_and_coloured_inside():
    frame = np.full((60, 60, 3), 90, np.uint8)
    row = overlay_masks(frame, square(), show_ids=False)[30]
    expected = [(90, 90, 90), (0, 0, 0), (255, 255, 255), object_color(1), object_color(1)]
    assert row[13:18].tolist() == [list(color) for color in expected]
    ids = square()
    ids[15:45, 30:45] = 2  # two that touch
    row = overlay_masks(frame, ids, show_ids=False)[30]
    assert row[28:32].tolist() == [list(object_color(1)), [255] * 3, [255] * 3, list(object_color(2))]
    # A frame is enlarged before it is drawn on, so that lines stay fine.
    shown = overlay_masks(frame, square(), height=240, show_ids=False)
    assert shown.shape == (240, 240, 3) and shown[120, 59:62].tolist() == [list(color) for color in expected[1:4]]
    first, eighth = (overlay_masks(frame, square(object_id=i), show_ids=False) for i in (1, 8))
    assert object_color(1) == object_color(8) != object_color(2)
    assert (first != eighth)[20:40, 20:40].any(axis=-1).mean() > 0.2  # objects of one colour are hatched differently
    assert overlay_masks(frame, np.zeros((60, 60), np.uint8)) is frame and (frame == 90).all()


@pytest.mark.parametrize("blindness", [None, DEUTERANOPIA])
def test_colours_of_objects_are_told_apart(blindness):
    colors = lab(np.array(OBJECT_COLORS, float), blindness)
    for a, b in itertools.combinations(range(len(colors)), 2):
        assert np.linalg.norm(colors[a] - colors[b]) > 15, (OBJECT_COLORS[a], OBJECT_COLORS[b])


def test_letters_that_the_font_lacks_are_no_news(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(2):
            plot_sheet({"名前": [np.zeros((8, 8, 3), np.uint8)]}, tmp_path / f"{number}.png", "題")
    assert len([*tmp_path.glob("*.png")]) == 2
