"""A picture that the page shows without a file of it on the server.

Gradio writes a `.pyi` beside a file that has a component of its own, so the component is alone here.
"""

from typing import Any

import gradio as gr
from gradio.data_classes import Base64ImageData

from .pictures import jpeg_url


class Picture(gr.Image):
    """A picture that is sent within the answer itself, as a JPEG."""

    def postprocess(self, value: Any) -> Base64ImageData | None:
        """A picture (H, W, 3) uint8 as what is sent."""
        return None if value is None else Base64ImageData(url=jpeg_url(value))

    def get_block_name(self) -> str:
        """What the page takes it for."""
        return "image"
