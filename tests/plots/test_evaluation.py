"""Plots of an evaluation's figures."""

import pytest
from matplotlib.figure import Figure

from helpers.results import make_result
from samoe_hf.evaluation.statistics import combine_runs
from samoe_hf.plots.evaluation import plot_by_size, plot_over_time


@pytest.mark.parametrize("labels", [["_a", r"b$\c^{$"], [str(i) for i in range(9)]])
def test_labels_of_models_are_in_the_legends_as_they_are(tmp_path, monkeypatch, labels):
    """Matplotlib leaves out labels that begin with an underscore, and takes `$` for mathematics."""
    figures, save = [], Figure.savefig
    summary = combine_runs({None: [make_result([[0.5], [0.6]])]}, "all")
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    for plot in (plot_over_time, plot_by_size):
        plot([summary | {"label": label} for label in labels], tmp_path / "plot.png")
    assert {line.get_marker() for line in figures[0].axes[0].lines} == {"o"}  # a curve of few frames
    for figure in figures:
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == labels
        boxes = [legend.get_window_extent(), *(axes.get_tightbbox() for axes in figure.axes)]
        assert not any(boxes[0].overlaps(box) for box in boxes[1:])
