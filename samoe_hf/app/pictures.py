"""Frames as the page shows them: scaled, with objects and prompts drawn over them, as JPEGs."""

import base64
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

from samoe_hf.inference import VideoPrompt
from samoe_hf.plots.masks import object_color, overlay_masks

# Frames are shown within these heights and widths, in pixels: small ones larger than they are, so that objects can be
# hit, and large ones smaller, so that they are sent quickly.
LEAST_HEIGHT, MOST_HEIGHT, MOST_WIDTH = 384, 720, 1280
JPEG_QUALITY = 88


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in which a frame of a size is shown."""
    height, width = size
    target = min(max(height, LEAST_HEIGHT), MOST_HEIGHT)
    target = max(1, min(target, height * MOST_WIDTH // width))
    return target, max(1, round(target * width / height))


def to_video(x: float, y: float, size: tuple[int, int]) -> tuple[float, float]:
    """Where in the video, in its pixels, the middle of a pixel (x, y) of the shown picture lies."""
    shown = shown_size(size)
    return (x + 0.5) * size[1] / shown[1], (y + 0.5) * size[0] / shown[0]


def draw_frame(
    frame: np.ndarray,
    id_map: np.ndarray,
    prompts: Sequence[VideoPrompt] = (),
    corner: tuple[float, float] | None = None,
) -> np.ndarray:
    """Draws objects, prompts and a box's first corner over a frame (H, W, 3) uint8, at the size that it is shown in.

    Prompts and corner are in pixels of the video; a plus is a positive point, a minus a negative one.
    """
    picture = overlay_masks(frame, id_map, shown_size(frame.shape[:2])[0])
    if not prompts and corner is None:
        return picture
    image = Image.fromarray(picture)
    draw, scale = ImageDraw.Draw(image), (picture.shape[1] / frame.shape[1], picture.shape[0] / frame.shape[0])
    for prompt in prompts:
        _draw_prompt(draw, prompt, scale)
    if corner is not None:
        x, y = corner[0] * scale[0], corner[1] * scale[1]
        for width, color in ((5, "black"), (2, "white")):
            draw.line((x - 12, y, x + 12, y), color, width)
            draw.line((x, y - 12, x, y + 12), color, width)
    return np.asarray(image)


def _draw_prompt(draw: ImageDraw.ImageDraw, prompt: VideoPrompt, scale: tuple[float, float]) -> None:
    color = object_color(prompt.object_id)
    if prompt.box is not None:
        x0, y0, x1, y1 = (value * scale[i % 2] for i, value in enumerate(prompt.box))
        draw.rectangle((x0, y0, x1, y1), outline="black", width=4)
        draw.rectangle((x0 + 1, y0 + 1, max(x1 - 1, x0 + 1), max(y1 - 1, y0 + 1)), outline=color, width=2)
    for (x, y), label in zip(prompt.points, prompt.labels, strict=True):
        x, y, radius = x * scale[0], y * scale[1], 8
        fill = color if label else (255, 255, 255)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline="black", width=2)
        draw.line((x - 4, y, x + 4, y), "black", 2)
        if label:
            draw.line((x, y - 4, x, y + 4), "black", 2)


def jpeg_url(picture: np.ndarray) -> str:
    """A picture as a `data:` URL: nothing of it is written to the server's disk or can be fetched by another page."""
    stream = BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
