"""The map of domains."""

import numpy as np
from matplotlib.transforms import Bbox
from PIL import Image

from samoe_hf.plots.domains import draw_domains


def test_long_names_and_wide_pictures_of_domains_are_in_the_map_as_a_whole(tmp_path):
    Image.new("RGB", (600, 40)).save(tmp_path / "wide.png")
    figure = draw_domains(["first", "a" * 64], np.array([[0.3, 4], [5, 0.3]]), {"first": tmp_path / "wide.png"})
    figure.savefig(tmp_path / "map.png")  # makes the layout
    shown = figure.get_tightbbox()
    assert Bbox.from_bounds(0, 0, *figure.get_size_inches()).padded(0.01).contains(*shown.min)
    assert (shown.max <= figure.get_size_inches() + 0.01).all()
