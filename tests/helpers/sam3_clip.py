"""A clip that Meta's tracker of SAM 3 and ours follow alike: weights, features of frames, and prompts.

It is drawn by names with NumPy's generator that never changes, so that both environments draw the same.
"""

from zlib import crc32

import numpy as np

SIZE, STRIDE, HIDDEN, MEMORY, FEED_FORWARD = 64, 16, 128, 64, 64
NUM_FRAMES = 32
# By object and frame. Points and boxes are (x, y), a mask is all that is in a box. Of more than four prompts not all
# are read on a frame.
PROMPTS = {
    "point": {0: {"point": [20, 30]}},
    "mask": {0: {"mask": [10, 20, 40, 50]}},
    "late": {12: {"box": [22, 8, 60, 44]}},
    "often": {t: {"point": [3 * t, 50 - 2 * t]} for t in (2, 4, 7, 8, 13, 17)},
    "last": {31: {"point": [40, 20]}},
}
# The directions in which an object is tracked from its first prompt, one after the other.
FORWARD, BACK = False, True
PASSES = {"late, back first": ("late", (BACK, FORWARD)), **{name: (name, (FORWARD, BACK)) for name in PROMPTS}}
# Object scores are spread around zero.
SCORE_LAYER, SPREAD, MEAN = "sam_mask_decoder.pred_obj_score_head.layers.2.", 15, 1.04


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(crc32(name.encode())).standard_normal(shape)


def draw_features() -> list[np.ndarray]:
    """Three levels (frames, channels, height, width), which the mask decoder's own projections have passed."""
    side = SIZE // STRIDE
    shapes = [(HIDDEN // 8, 4 * side, 4 * side), (HIDDEN // 4, 2 * side, 2 * side), (HIDDEN, side, side)]
    return [draw(f"features {level}", (NUM_FRAMES, *shape)) for level, shape in enumerate(shapes)]


def draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of Meta's name, with which memories show in masks and scores, and scores are low and high."""
    drawn = draw(name, shape)
    if len(shape) > 1:
        drawn /= np.prod(shape[1:]) ** 0.5
    else:
        drawn = 0.1 * drawn + name.endswith(("weight", "gamma"))
    if name.startswith(SCORE_LAYER):
        drawn = SPREAD * (drawn - MEAN * name.endswith("bias"))
    return drawn
