"""Intensities of more than 8 bits as gray values: which become black and white."""

from __future__ import annotations

import numpy as np

from samoe_hf.errors import InputError

from .frames import SampleError

Window = tuple[float, float]


def check_window(window: Window | None) -> None:
    """Raises `InputError` for a window whose first intensity is not below its second."""
    if window is not None and not (len(window) == 2 and window[0] < window[1]):
        raise InputError(f"`window` must be (black, white), the smaller intensity first, not {tuple(window)}")


def find_window(values: np.ndarray) -> Window:
    """The 0.5 and 99.5 percentiles of intensities of any shape and real dtype; those that are not finite do not count.

    Raises:
        SampleError: none is finite.
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise SampleError("no finite intensities")
    low, high = np.percentile(finite, (0.5, 99.5))
    return float(low), float(high)


def to_uint8(values: np.ndarray, window: Window | None = None) -> np.ndarray:
    """Intensities as gray values 0…255.

    Args:
        values: any shape and real dtype; uint8 without a window is returned as it is.
        window: intensities that become 0 and 255; by default the 0.5 and 99.5 percentiles. NaN becomes 0.
    """
    if values.dtype == np.uint8 and window is None:
        return values
    low, high = find_window(values) if window is None else window
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = (values.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    return np.rint(np.nan_to_num(scaled, copy=False).clip(0, 255)).astype(np.uint8)
