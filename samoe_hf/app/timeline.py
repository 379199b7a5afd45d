"""The timeline of a tracked video: doubt along it, the frames that are worth a look, and what was prompted."""

import numpy as np
from PIL import Image, ImageDraw

from samoe_hf.plots.masks import object_color

from .session import TrackingSession

TIMELINE_SIZE = 96, 1280
MARGIN, STRIP, NEAR = 14, 26, 14  # at the sides, below for prompts, and by how much a click may miss a mark; in pixels
TRACKED, OTHER, PAPER, DOUBT, MARK = (190, 198, 208), (228, 231, 236), (248, 249, 251), (245, 158, 66), (200, 30, 30)


def _columns(session: TrackingSession) -> np.ndarray:
    """The column of each frame's middle."""
    return np.linspace(MARGIN, TIMELINE_SIZE[1] - 1 - MARGIN, session.num_frames)


def frame_at(session: TrackingSession, x: float) -> int:
    """The frame of a column; one that is worth a look if it is near."""
    ways = np.abs(_columns(session) - x)
    looks = [look.frame for look in session.looks if ways[look.frame] <= NEAR]
    return min(looks, key=lambda frame: ways[frame]) if looks else int(ways.argmin())


def draw_timeline(session: TrackingSession, shown: int) -> np.ndarray:
    """Draws the timeline with a line at the shown frame: (H, W, 3) uint8."""
    (height, width), columns, doubt = TIMELINE_SIZE, _columns(session), session.doubt
    base, middles = height - STRIP, (columns[1:] + columns[:-1]) / 2
    nearest = np.searchsorted(middles, np.arange(width))
    bars = doubt[nearest]
    np.maximum.at(bars, columns.astype(int), doubt)  # of more frames than columns, none is left out
    tracked = np.isin(nearest, [frame for frame in range(session.num_frames) if frame in session.masks.frames])
    picture = np.full((height, width, 3), PAPER, dtype=np.uint8)
    picture[:base][np.arange(base)[:, None] >= base * (1 - bars)] = DOUBT
    picture[base:] = np.where(tracked[:, None], TRACKED, OTHER)
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for look in session.looks:
        x = float(columns[look.frame])
        draw.line((x, 0, x, base), MARK, 3)
        draw.polygon([(x - 11, 0), (x + 11, 0), (x, 20)], MARK)
    for (object_id, frame), prompt in sorted(session.prompts.items()):
        x, y = float(columns[frame]), base + STRIP / 2
        fill = "white" if prompt.end else object_color(object_id)
        draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill=fill, outline="black", width=2)
    x = float(columns[shown])
    draw.line((x, 0, x, height), "black", 3)
    return np.asarray(image)
