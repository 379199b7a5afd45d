"""Pictures of what experts do, and of domains: labels that can be read, and the colours that they promise."""

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from helpers.pictures import overlapping_texts, rgb
from samoe_hf.plots.domains import draw_domains
from samoe_hf.plots.experts import (
    DISTINCT_COLORS,
    plot_bars,
    plot_heat_maps,
    plot_matrices,
    plot_routing,
    tables_by_domain,
)


@pytest.mark.parametrize("layers, experts, domains", [(3, 8, 2)])
def test_labels_of_the_pictures_do_not_overlap(layers, experts, domains):
    rng = np.random.default_rng(0)
    names = [f"layer {n // 8} {('self', 'cross')[n // 4 % 2]} {'qkvo'[n % 4]}" for n in range(layers)]
    names[-1] = "vision_encoder.backbone.blocks.11.mlp.proj_out"
    tables = {f"domain {d}": rng.dirichlet(np.ones(experts), layers) for d in range(domains)}
    panels = {name: {d: table[row] for d, table in tables.items()} for row, name in enumerate(names)}
    figures = [
        plot_bars(panels, "mean gate weight", "Weight that routers give to each expert, by domain"),
        plot_heat_maps(tables, names, "mean gate weight", "Weight that routers give to each expert"),
        plot_heat_maps(
            tables, names, "difference", "Title", diverging=True, bars=("information", np.ones(layers), 1.0)
        ),
        plot_matrices({name: np.eye(experts) for name in names}, "share of tokens", "Experts that are chosen together"),
    ]
    for figure in figures:
        assert overlapping_texts(figure) == []


def test_names_are_drawn_as_they_are(tmp_path):
    """Neither `$` nor an underscore means anything in the name of a domain, video or layer."""
    odd = r"_a$\b^{$c"
    usage = {odd: {odd: np.array([0.2, 0.8]), "b": np.array([1.0])}, "l": {odd: np.array([0.5, 0.5])}}
    tables = tables_by_domain(usage)
    np.testing.assert_array_equal(tables["b"], [[1, np.nan], [np.nan, np.nan]])
    figures = [
        plot_bars(usage, "weight", "title"),
        plot_heat_maps(tables, list(usage), "weight", "title"),
        plot_matrices({odd: np.eye(2)}, "share", "title"),
    ]
    for number, figure in enumerate(figures):
        assert any(text.get_text() == odd and not text.get_parse_math() for text in figure.findobj(Text)), number
    frames, masks = np.zeros((2, 40, 400, 3), dtype=np.uint8), np.zeros((2, 40, 400), dtype=bool)
    plot_routing(frames, masks, np.zeros((2, 4, 4), dtype=int), 2, tmp_path / "strip.png", odd)
    assert Image.open(tmp_path / "strip.png").size[0] < 1200  # of a wide video, too


def test_more_experts_than_colours(tmp_path):
    """The nine that are chosen most have colours; the rest is called other experts."""
    frames, masks = np.zeros((2, 40, 40, 3), dtype=np.uint8), np.zeros((2, 40, 40), dtype=bool)
    maps = np.full((2, 4, 4), -1)
    maps[1] = np.minimum(np.arange(16), 13).reshape(4, 4)
    plot_routing(frames, masks, maps, 14, tmp_path / "strip.png", "title")
    picture = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB")).reshape(-1, 3).astype(int)
    for number in range(len(DISTINCT_COLORS)):
        assert (np.abs(picture - 0.7 * rgb(number)).max(axis=1) < 3).sum() > 50, number


def test_long_names_and_wide_pictures_of_domains_are_in_the_map_as_a_whole(tmp_path):
    Image.new("RGB", (600, 40)).save(tmp_path / "wide.png")
    figure = draw_domains(["first", "a" * 64], np.array([[0.3, 4], [5, 0.3]]), {"first": tmp_path / "wide.png"})
    figure.savefig(tmp_path / "map.png")  # makes the layout
    shown = figure.get_tightbbox()
    assert (shown.min >= -0.01).all() and (shown.max <= figure.get_size_inches() + 0.01).all()
