"""What pictures show: colours of experts, and texts that cover each other."""

import itertools

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from samoe_hf.plots.experts import DISTINCT_COLORS


def rgb(number: int) -> np.ndarray:
    return np.array([int(DISTINCT_COLORS[number][i : i + 2], 16) for i in (1, 3, 5)], dtype=float)


def overlapping_texts(figure) -> list[tuple[str, str]]:
    """Pairs of texts of a figure that cover each other; nothing may stick out of it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.02
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer()).padded(-1)) for text in texts]
    boxes = [(text, box) for text, box in boxes if box.width > 0 and box.height > 0]
    assert len(boxes) > 5
    return [(a, b) for (a, p), (b, q) in itertools.combinations(boxes, 2) if p.overlaps(q)]
