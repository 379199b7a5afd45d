"""Synthetic videos of moving objects that occlude each other, in several domains, two of which look alike.

They need no download and cost a few milliseconds. "scenes", "night" and "paper" are varied within themselves: they are
what the small base model has learned. Videos of a kind of `SYNTHETIC_KINDS` are harder to track.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from samoe_hf.errors import InputError

from .frames import SampleError
from .options import check_types
from .schema import Video, VideoList

_float32 = partial(np.asarray, dtype=np.float32)
_Rng = np.random.Generator
_Size = tuple[int, int]  # height and width
# Turns an object's own coordinates and depth into colour and opacity, so that its texture moves with it.
_Painter = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[Any, np.ndarray]]


@dataclass
class _Body:
    """A convex shape and its motion. Lengths in pixels, angles in radians, one value per frame where it says (T,)."""

    centers: np.ndarray  # (T, 2), x and y
    angles: np.ndarray  # (T,)
    radii: np.ndarray  # (T,)
    normals: np.ndarray  # (sides, 2) of a polygon around the unit circle, or (0, 2) for an ellipse
    aspect: float  # length over width, at least 1

    @property
    def reach(self) -> np.ndarray:
        """How far from its center a body has pixels at most (T,)."""
        return 1.5 * self.aspect * self.radii

    def local_grid(self, frame: int, size: _Size) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
        """The part of the frame around the body, and its pixels' coordinates in units of the body's radius."""
        reach = self.reach[frame]
        low = np.clip(self.centers[frame] - reach, 0, (size[1], size[0])).astype(int)
        high = np.clip(self.centers[frame] + reach + 1, 0, (size[1], size[0])).astype(int)
        x = np.arange(low[0], high[0], dtype=np.float32) - self.centers[frame, 0]
        y = np.arange(low[1], high[1], dtype=np.float32)[:, None] - self.centers[frame, 1]
        angle, radius = self.angles[frame], np.float32(self.radii[frame])
        cos, sin = np.float32(np.cos(angle)) / radius, np.float32(np.sin(angle)) / radius
        u, v = (cos * x + sin * y) / np.float32(self.aspect), cos * y - sin * x
        return (slice(low[1], high[1]), slice(low[0], high[0])), u, v

    def depth(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """How far inside the outline a point is: 1 in the center, 0 on the outline, negative outside."""
        if len(self.normals) == 0:
            return 1 - np.hypot(u, v)
        sides = [nx * u + ny * v for nx, ny in self.normals.astype(np.float32)]
        return 1 - np.max([*sides, np.hypot(u, v) / np.float32(1.5)], axis=0)  # corners are rounded off at 1.5


def _bounce(start: np.ndarray, velocity: np.ndarray, low: np.ndarray, high: np.ndarray, num_frames: int) -> np.ndarray:
    """Positions (T, 2) of a point that moves evenly and is reflected at the bounds."""
    span = high - low
    travelled = (start - low + velocity * np.arange(num_frames)[:, None]) % (2 * span)
    return low + span - np.abs(travelled - span)


def _start_positions(rng: _Rng, radii: np.ndarray, size: _Size) -> np.ndarray:
    """Starting centers (num_objects, 2) inside the frame, as far apart as a few tries get, so that all are seen."""
    extent = np.array([size[1], size[0]])
    centers: list[np.ndarray] = []
    for radius in radii:
        tries = rng.uniform(0.15, 0.85, (24, 2)) * extent
        gaps = [np.linalg.norm(tries - c, axis=1) - r - radius for c, r in zip(centers, radii, strict=False)]
        centers.append(tries[np.argmax(np.min(gaps, axis=0))] if gaps else tries[0])
    return np.array(centers)


def _bodies(
    rng: _Rng, num_bodies: int, num_frames: int, size: _Size, sizes: tuple[float, float], leaving: float
) -> list[_Body]:
    """Bodies that move evenly and bounce at the frame's borders, or, a share of them, outside."""
    extent, side, time = np.array([size[1], size[0]]), min(size), np.arange(num_frames)
    radii = side * rng.uniform(*sizes, num_bodies)
    bodies = []
    for radius, center in zip(radii, _start_positions(rng, radii, size), strict=True):
        leaves = rng.random() < leaving  # its bounds then lie outside the frame, and it moves fast enough to get there
        heading = rng.uniform(0, 2 * np.pi)
        speed = side * (rng.uniform(0.05, 0.08) if leaves else rng.uniform(0.01, 0.04))
        margin = 2.2 * radius if leaves else -0.5 * radius
        velocity = speed * np.array([np.cos(heading), np.sin(heading)])
        turns = rng.uniform(0, 2 * np.pi) + rng.uniform(-0.1, 0.1) * time
        scales = 1 + 0.15 * np.sin(rng.uniform(0, 2 * np.pi) + rng.uniform(0.1, 0.3) * time)
        sides = int(rng.choice([0, 3, 4, 5, 6]))
        directions = 2 * np.pi * (np.arange(sides) + rng.uniform(-0.2, 0.2, sides)) / max(sides, 1)
        normals = np.stack([np.cos(directions), np.sin(directions)], axis=-1)
        centers = _bounce(center, velocity, np.zeros(2) - margin, extent + margin, num_frames)
        bodies.append(_Body(centers, turns, radius * scales, normals, rng.uniform(1.0, 1.5)))
    return bodies


def _smooth_noise(rng: _Rng, size: _Size, cell: int, channels: int) -> np.ndarray:
    """Noise in 0..1 with features of about `cell` pixels, (H, W, channels) float32."""
    rows, columns = (np.arange(n, dtype=np.float32) / cell for n in size)
    grid = rng.random((int(rows[-1]) + 2, int(columns[-1]) + 2, channels), dtype=np.float32)
    i, j = rows.astype(int), columns.astype(int)
    a, b = (rows - i)[:, None, None], (columns - j)[:, None]
    grid = grid[i] * (1 - a) + grid[i + 1] * a
    return grid[:, j] * (1 - b) + grid[:, j + 1] * b


def _sharp(depth: np.ndarray) -> np.ndarray:
    return (depth > 0).astype(np.float32)[..., None]


@dataclass(frozen=True)
class _Look:
    """What videos of a domain look like."""

    background: Callable[[_Rng, _Size], np.ndarray]  # (H, W, 1 or 3) float32 in 0..1
    painter: Callable[[_Rng, int], _Painter]  # of each object
    finish: Callable[[_Rng, np.ndarray], np.ndarray]  # what comes over finished frames
    sizes: tuple[float, float] = (0.09, 0.16)  # of bodies: radius as a share of the frame's shorter side
    max_clutter: int = 0  # bodies among the objects that are none


def _noisy(rng: _Rng, frames: np.ndarray, strength: float, shape: tuple[int, ...] | None = None) -> np.ndarray:
    return frames + np.float32(strength) * rng.standard_normal(shape or frames.shape, dtype=np.float32)


def _gray_noise(strength: float) -> Callable[[_Rng, np.ndarray], np.ndarray]:
    return lambda rng, frames: _noisy(rng, frames, strength, (*frames.shape[:3], 1))


def _clouds(dark: float, contrast: float, count: int, channels: int) -> Callable[[_Rng, _Size], np.ndarray]:
    """`count` clouds along the shorter side."""
    return lambda rng, size: dark + contrast * _smooth_noise(rng, size, max(2, min(size) // count), channels)


def _textured(rng: _Rng, order: int) -> _Painter:
    colour = _float32(0.15 + 0.7 * rng.permutation([0.0, rng.uniform(0, 1), 1.0]))
    fu, fv = rng.uniform(3, 9, 2).astype(np.float32)
    return lambda u, v, depth: (colour + 0.2 * (np.sin(fu * u) * np.sin(fv * v))[..., None], _sharp(depth))


def _blob(rng: _Rng, order: int) -> _Painter:
    gray = np.float32(rng.uniform(0.08, 0.16) if rng.random() < 0.5 else rng.uniform(0.55, 0.7))
    return lambda u, v, depth: (gray, np.clip(0.5 + 4 * depth, 0, 1)[..., None])  # half covered on the outline


def _speckle(rng: _Rng, frames: np.ndarray, strength: float = 0.3) -> np.ndarray:
    return frames * (1 + strength * rng.standard_normal(frames.shape, dtype=np.float32))


def _weak_speckle(rng: _Rng, frames: np.ndarray) -> np.ndarray:
    falloff = np.linspace(1.25, 0.85, frames.shape[2], dtype=np.float32)[:, None]
    return _speckle(rng, frames * falloff, 0.22)


def _tones(phase: np.ndarray) -> np.ndarray:
    return np.where(np.sin(phase)[..., None] > 0, _float32([0.85, 0.75, 0.5]), _float32([0.15, 0.2, 0.35]))


def _diagonal_stripes(rng: _Rng, size: _Size) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32) * np.float32(40 / min(size))
    return _tones(x + y + np.float32(rng.uniform(0, 6)))


def _striped(rng: _Rng, order: int) -> _Painter:
    frequency = np.float32(rng.uniform(4, 8))
    return lambda u, v, depth: (_tones(frequency * (np.hypot(u, v) if order % 2 else u)), _sharp(depth))


def _colour(rng: _Rng) -> np.ndarray:
    """Any colour (3,), a third of the time a gray."""
    return _float32(np.full(3, rng.random()) if rng.random() < 1 / 3 else rng.random(3))


def _ground(rng: _Rng, size: _Size) -> np.ndarray:
    first, second = _colour(rng), _colour(rng)
    coarse = _smooth_noise(rng, size, max(2, int(min(size) / rng.uniform(1, 12))), 1)
    kind = rng.integers(4)
    if kind == 0:  # a plain wall
        coarse = 0.2 * coarse
    elif kind == 1:  # patches with edges
        coarse = np.clip(0.5 + 12 * (coarse - 0.5), 0, 1)
    elif kind == 2:  # tiles
        tile = max(2, int(min(size) * rng.uniform(0.08, 0.3)))
        y, x = np.mgrid[: size[0], : size[1]] // tile
        coarse = 0.6 * ((x + y) % 2)[..., None].astype(np.float32) + 0.4 * coarse
    return first * (1 - coarse) + second * coarse + 0.15 * (_smooth_noise(rng, size, 2, 1) - 0.5)


def _wavy(rng: _Rng, order: int) -> _Painter:
    colour, contrast, softness = _colour(rng), np.float32(rng.uniform(0, 0.4)), np.float32(rng.uniform(4, 30))
    directions, phases = _float32(rng.normal(0, 3, (3, 2))), _float32(rng.uniform(0, 6, 3))
    rim = np.float32(rng.uniform(0, 0.5))

    def paint(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        waves = sum(
            (np.sin(a * u + b * v + p) for (a, b), p in zip(directions, phases, strict=True)), np.zeros_like(depth)
        )
        shade = 1 - rim * (1 - np.clip(2 * depth, 0, 1))
        opacity = np.clip(0.5 + softness * depth, 0, 1)
        return (colour + contrast / 3 * waves[..., None]) * shade[..., None], opacity[..., None]

    return paint


def _changing_light(rng: _Rng, frames: np.ndarray) -> np.ndarray:
    num_frames, width = frames.shape[0], frames.shape[2]
    drift = 1 + 0.15 * np.sin(rng.uniform(0, 6) + rng.uniform(0, 0.5) * np.arange(num_frames))
    left, right = rng.uniform(0.6, 1.2, 2)
    side = np.linspace(left, right, width)
    light = drift[:, None, None, None] * side[:, None] * rng.uniform(0.8, 1.1, 3)
    return _noisy(rng, frames * light.astype(np.float32), rng.uniform(0, 0.06))


def _cone_of_light(rng: _Rng, frames: np.ndarray) -> np.ndarray:
    """A light that moves over the scene, and the noise of a camera at its limit."""
    num_frames, height, width, _ = frames.shape
    start, velocity = rng.uniform(0.3, 0.7, 2), rng.uniform(-0.02, 0.02, 2)
    center = start + velocity * np.arange(num_frames)[:, None]
    y = np.arange(height)[:, None] / height - center[:, 0, None, None]
    x = np.arange(width) / width - center[:, 1, None, None]
    light = rng.uniform(0.2, 0.4) + 0.6 * np.exp(-(x**2 + y**2) / rng.uniform(0.05, 0.2))
    blue = _float32([0.75, 0.85, 1.0])
    return _noisy(rng, frames * light[..., None].astype(np.float32) * blue, rng.uniform(0.02, 0.08))


def _sheet(rng: _Rng, size: _Size) -> np.ndarray:
    paper = _float32([1.0, 0.97, 0.9]) * np.float32(rng.uniform(0.75, 1))
    return paper - 0.12 * _smooth_noise(rng, size, max(2, min(size) // 6), 1) * np.ones(3, np.float32)


def _drawn(rng: _Rng, order: int) -> _Painter:
    """Pale, with a dark line around, and at times the same lines as hatching inside."""
    fill, ink = _float32(1 - 0.45 * rng.random(3)), _float32(0.3 * rng.random(3))
    width, gap = np.float32(rng.uniform(0.08, 0.2)), np.float32(rng.uniform(5, 10))
    hatched = rng.random() < 0.5

    def paint(u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        is_ink = depth < width
        if hatched:
            is_ink = is_ink | (np.sin(gap * (u + v)) > 0.8)
        return np.where(is_ink[..., None], ink, fill), _sharp(depth)

    return paint


_LOOKS = {
    "shapes": _Look(_clouds(0.25, 0.4, 8, 3), _textured, _gray_noise(0.02)),
    "blobs": _Look(_clouds(0.3, 0.1, 4, 1), _blob, _speckle),
    "echoes": _Look(_clouds(0.3, 0.1, 4, 1), _blob, _weak_speckle),
    "stripes": _Look(_diagonal_stripes, _striped, lambda rng, frames: frames),
    "scenes": _Look(_ground, _wavy, _changing_light, (0.07, 0.2), 2),
    "night": _Look(_ground, _wavy, _cone_of_light, (0.07, 0.2), 2),
    "paper": _Look(_sheet, _drawn, _gray_noise(0.03), (0.07, 0.2), 1),
}
SYNTHETIC_DOMAINS = tuple(_LOOKS)

_MIN_FRAMES = {"late": 2, "return": 3, "occlusion": 3, "double": 1, "cut": 3}
SYNTHETIC_KINDS = tuple(_MIN_FRAMES)
_MAX_TRIES = 100


def _some_frames(rng: _Rng, num_frames: int) -> tuple[int, int]:
    """Up to a quarter of the frames, without the first and the last: from a start to before an end."""
    start = int(rng.integers(1, max(2, 2 * num_frames // 3)))
    return start, min(num_frames - 1, start + int(rng.integers(max(1, num_frames // 8), num_frames // 4 + 2)))


def _stay_outside(rng: _Rng, body: _Body, size: _Size, start: int, end: int) -> None:
    """Bends a body's way so that it is left or right of the frame from `start` to before `end`.

    On the frames beside these its center is on the frame's border. From there it goes back to its way, at 8 % of the
    frame's shorter side a frame.
    """
    time, x, is_left = np.arange(len(body.radii)), body.centers[:, 0], rng.random(2) < 0.5
    is_left = is_left[(time >= end - 1).astype(int)]  # on the side where it leaves, or where it comes in
    num_since = np.maximum(start - 1 - time, time - end)
    way = np.where(is_left, 0, size[1]) - x
    bent = x + np.sign(way) * np.maximum(abs(way) - 0.08 * min(size) * num_since, 0)
    outside = np.where(is_left, -1 - body.reach, size[1] + 1 + body.reach)
    body.centers[:, 0] = np.where(num_since < 0, outside, bent)


def _swap_ways(rng: _Rng, first: _Body, second: _Body) -> None:
    """Two bodies change over to each other's way within a third of the frames, and so pass each other."""
    num_frames = len(first.radii)
    share = np.clip(3 * np.arange(num_frames) / num_frames - rng.uniform(0, 2), 0, 1)[:, None]
    change = share * (second.centers - first.centers)
    first.centers, second.centers = first.centers + change, second.centers - change


def _cover(rng: _Rng, body: _Body, occluder: _Body) -> None:
    """Moves the occluder over a body, so that it hides the body in the middle of some frames."""
    (start, end), reach, heading = _some_frames(rng, len(body.radii)), body.reach.max(), rng.uniform(0, 2 * np.pi)
    offsets = 1.4 * reach * (np.arange(len(body.radii)) - (start + end - 1) / 2) / (end - start)
    occluder.centers = body.centers + offsets[:, None] * np.array([np.cos(heading), np.sin(heading)])
    occluder.radii = np.full(len(offsets), 1.2 * reach)


def _shows(kind: str, masks: np.ndarray) -> bool:
    """Whether objects (T, N, H, W) do what the kind says, and no sliver is all that their first frames have of them."""
    areas = masks.sum(axis=(2, 3))
    seen = areas > 0
    if (areas[seen.argmax(axis=0), np.arange(areas.shape[1])] <= areas.max(axis=0) / 4).any():
        return False
    if kind == "late":
        return not seen[0].all()
    seen_before, seen_after = (np.logical_or.accumulate(s) for s in (seen, seen[::-1]))
    is_away = seen_before & seen_after[::-1] & ~seen
    return bool(seen[0].all() and (kind not in ("return", "occlusion") or is_away.any(axis=0).all()))


def _paint(
    bodies: Sequence[_Body],
    painters: Sequence[_Painter],
    columns: Sequence[int],
    times: Sequence[int],
    frames: np.ndarray,
    masks: np.ndarray,
) -> None:
    """Paints bodies, the farthest first, into frames, and what is seen of objects into columns of the masks.

    `columns`: of each body, -1 for one that is no object. `times`: the frames to paint.
    """
    for body, paint, column in zip(bodies, painters, columns, strict=True):
        for t in times:
            (rows, cols), u, v = body.local_grid(t, (frames.shape[1], frames.shape[2]))
            depth = body.depth(u, v)
            colour, opacity = paint(u, v, depth)
            frames[t, rows, cols] = opacity * colour + (1 - opacity) * frames[t, rows, cols]
            masks[t, :, rows, cols] &= depth <= 0
            if column >= 0:
                masks[t, column, rows, cols] = depth > 0


class SyntheticVideos(VideoList):
    """Videos of objects that move, turn, change size, bounce, occlude each other, and at times leave and return.

    Video i depends on i and on the arguments but `num_videos` only. Every object is seen on the first frame, unless it
    is late; its mask is what is visible of it, so masks do not overlap.

    Args:
        num_frames: frames per video.
        image_size: (height, width) in pixels.
        max_objects: each video has 1 to this many objects.
        domain: "shapes" (coloured textured shapes over clouds), "blobs" (soft gray blobs in speckle, like ultrasound),
            "echoes" (look alike: the same blobs under other light, in weaker speckle), "stripes" (texture alone
            tells objects from background), "scenes" (any colours, textures, sizes and lights, and bodies that are no
            objects among them), "night" (scenes in the dark) or "paper" (drawings); also the videos' domain name.
        kinds: what is hard about the videos, one kind after the other; their ids name it. "late" (all objects but the
            first, or the only one, come in later), "return" (each object leaves and comes back), "occlusion" (each is
            hidden for a while by something that is no object, and objects pass each other), "double" (all objects look
            the same, and so does something that is none; they pass each other) or "cut" (some frames are of another
            camera on the other side: left and right, near and far are swapped, sizes and background others). By
            default nothing is.

    Raises:
        InputError: an argument is wrong, or there are too few frames for a kind.
        SampleError: a video that is opened cannot show its kind, as in too small images.
    """

    def __init__(
        self,
        num_videos: int,
        num_frames: int,
        image_size: tuple[int, int] = (128, 128),
        max_objects: int = 3,
        domain: str = "shapes",
        seed: int = 0,
        kinds: Sequence[str] = (),
    ):
        self.num_videos, self.num_frames, self.image_size = num_videos, num_frames, image_size
        self.max_objects, self.domain, self.seed, self.kinds = max_objects, domain, seed, kinds
        check_types(SyntheticVideos, vars(self), "synthetic videos")
        if domain not in _LOOKS:
            raise InputError(f"unknown synthetic domain {domain!r}; there are {', '.join(SYNTHETIC_DOMAINS)}")
        if min(num_videos, num_frames, max_objects, seed + 1, *image_size) < 1:
            raise InputError("num_videos, num_frames, max_objects and image_size must be at least 1, and seed 0")
        for kind in kinds:
            if kind not in _MIN_FRAMES:
                raise InputError(f"unknown kind {kind!r} of synthetic videos; there are {', '.join(SYNTHETIC_KINDS)}")
            if num_frames < _MIN_FRAMES[kind]:
                raise InputError(f"{kind!r} videos need num_frames of at least {_MIN_FRAMES[kind]}, not {num_frames}")
        super().__init__(range(num_videos), self._draw)

    def _draw(self, position: int, _: int) -> Video:
        seed = [self.seed, zlib.crc32(self.domain.encode()), position]
        kind = self.kinds[position % len(self.kinds)] if self.kinds else ""
        name = f"{self.domain}_{kind}".rstrip("_")
        for attempt in range(_MAX_TRIES):
            more = [zlib.crc32(kind.encode()), attempt] if kind else []
            frames, masks = self._render(np.random.default_rng(seed + more), kind)
            if not kind or _shows(kind, masks):
                break
        else:
            tried = f"{_MAX_TRIES} tries with {self.num_frames} frames of {self.image_size}"
            raise SampleError(f"no {name} video in {tried}")
        return Video.from_arrays(f"{name}_{self.seed}_{position:05d}", frames, masks, domain=self.domain)

    def _render(self, rng: _Rng, kind: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Frames (T, H, W[, 3]) uint8 and visible masks (T, num_objects, H, W) bool; later objects are nearer."""
        look, size, num_frames = _LOOKS[self.domain], (self.image_size[0], self.image_size[1]), self.num_frames
        is_object = np.ones(rng.integers(1, self.max_objects + 1), dtype=bool)
        num_objects = len(is_object)
        if look.max_clutter:
            is_object = rng.permutation(np.pad(is_object, (0, int(rng.integers(look.max_clutter + 1)))))
        # Occluders and the double are the nearest. What shall be hidden is small.
        is_object = np.pad(is_object, (0, {"occlusion": num_objects, "double": 1}.get(kind, 0)))
        low, high = (0.6 * share if kind == "occlusion" else share for share in look.sizes)
        bodies = _bodies(rng, len(is_object), num_frames, size, (low, high), 0 if kind else 0.25)
        frames = np.repeat(look.background(rng, size)[None], num_frames, axis=0)
        painters = [look.painter(rng, order) for order in range(len(bodies))]
        columns = np.where(is_object, is_object.cumsum() - 1, -1).tolist()
        objects, times, cut = [bodies[i] for i in np.flatnonzero(is_object)], range(num_frames), range(0)
        masks = np.zeros((num_frames, num_objects, *size), dtype=bool)
        passing = {"occlusion": objects, "double": [bodies[-1], *objects]}.get(kind, [])
        for first, second in zip(passing[::2], passing[1::2], strict=False):
            _swap_ways(rng, first, second)
        if kind == "late":
            for body in objects[1:] or objects:
                _stay_outside(rng, body, size, 0, int(rng.integers(1, max(2, 2 * num_frames // 3))))
        elif kind == "return":
            for body in objects:
                _stay_outside(rng, body, size, *_some_frames(rng, num_frames))
        elif kind == "occlusion":
            for body, occluder in zip(objects, bodies[-num_objects:], strict=True):
                _cover(rng, body, occluder)
        elif kind == "double":
            for i in np.flatnonzero(is_object):
                bodies[i] = replace(bodies[-1], centers=bodies[i].centers, angles=bodies[i].angles)
                painters[i] = painters[-1]
        elif kind == "cut":
            cut = range(*_some_frames(rng, num_frames))
            frames[cut] = look.background(rng, size)
            zoom, turn = rng.uniform(0.7, 1.4), rng.uniform(0, 2 * np.pi)
            others = [replace(body, angles=turn - body.angles, radii=zoom * body.radii) for body in bodies]
            for body in others:
                body.centers = body.centers * (-1, 1) + (size[1], 0)
            _paint(others[::-1], painters[::-1], columns[::-1], cut, frames, masks)
        _paint(bodies, painters, columns, [t for t in times if t not in cut], frames, masks)
        frames = np.clip(255 * look.finish(rng, frames), 0, 255).astype(np.uint8)
        return (frames[..., 0] if frames.shape[-1] == 1 else frames), masks
