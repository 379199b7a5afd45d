"""Pictures for cut-outs."""

from pathlib import Path

import numpy as np


def write_pictures(path: Path) -> Path:
    """A file as `scripts/small_base/pictures.py` writes it: two photographs of noise, three figures and a stamp."""
    rng = np.random.default_rng(0)
    figures = rng.integers(256, size=(3, 96, 96, 4), dtype=np.uint8)
    figures[..., 3] = 0
    figures[:, 20:80, 30:70, 3] = 255
    photos = {f"photo_{i:03d}": rng.integers(256, size=(90, 120, 3), dtype=np.uint8) for i in range(2)}
    np.savez(path, figures=figures, stamps=figures[:1], **photos)
    return path
