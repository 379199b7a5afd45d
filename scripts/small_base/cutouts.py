"""Natural videos made of pictures: cut-outs that move, bend and turn over photographs that move as well.

They are a kind of dataset, "cutouts", of the pictures that `pictures.py` has gathered, for `learn.py`. A clip of four
frames takes about 25 ms.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from samoe_hf.data import Video
from samoe_hf.data.layouts import Layout
from samoe_hf.data.schema import VideoList

SIDE = 96  # of a picture that is moved, in pixels


class CutOuts(VideoList):
    """Videos of 1 to `max_objects` objects among others that are none, over a moving photograph.

    Video i depends on i and on the arguments but `num_videos` only. An object is a figure or a region of a photograph,
    or has the outline of one and another picture within, and may have a limb. At times it has a double, leaves, or is
    hidden. Its mask is what is seen of it.

    Args:
        root: the file that `pictures.py` wrote.
        side: of the square frames, in pixels.
        parts: the share of objects that have several parts, each of other colours, as a rider and a horse have.
        slow: the share of videos in which all moves a third as fast.
    """

    def __init__(
        self,
        root: str | Path,
        num_videos: int = 20000,
        num_frames: int = 4,
        side: int = 128,
        max_objects: int = 3,
        seed: int = 0,
        domain: str = "cutouts",
        parts: float = 0.0,
        slow: float = 0.0,
    ):
        super().__init__(range(num_videos), self._draw)
        self.num_frames, self.side = num_frames, side
        self.max_objects, self.seed, self.domain = max_objects, seed, domain
        self.parts, self.slow = parts, slow
        with np.load(root) as file:
            self.figures, self.stamps = file["figures"], file["stamps"]
            self.photos = [file[name] for name in file.files if name.startswith("photo")]

    def _draw(self, position: int, _: int) -> Video:
        rng = np.random.default_rng([self.seed, position])
        frames, masks = self._render(rng)
        for _ in range(20):
            if masks[0].any(axis=(1, 2)).any() and masks[-1].any():
                break
            frames, masks = self._render(rng)
        return Video.from_arrays(f"{self.domain}_{self.seed}_{position:05d}", frames, masks, domain=self.domain)

    def _render(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Frames (T, H, W, 3) uint8, and what is seen of each object (T, N, H, W) bool."""
        num_objects = int(rng.integers(1, self.max_objects + 1))
        columns = [*range(num_objects), *[-1] * int(rng.integers(0, 4))]
        time = np.arange(self.num_frames)[:, None] * (0.33 if self.slow and rng.random() < self.slow else 1)
        pictures, own = [], []
        for _ in columns:
            double = pictures and rng.random() < 0.25
            pictures.append(pictures[rng.integers(len(pictures))] if double else self._object(rng))
            own.append(_motion(rng, time))
        camera = _camera(rng, time)
        layers: list[tuple[int, Tensor, np.ndarray]] = []  # column, picture and motion, the farthest first
        for i in rng.permutation(len(columns)):
            layers.append((columns[i], pictures[i], own[i]))
            limbs = int(rng.random() < 0.35)
            if self.parts and rng.random() < self.parts / 2:
                limbs = int(rng.integers(1, 4))
            for _ in range(limbs):
                place = len(layers) - int(rng.integers(2))
                layers.insert(place, (columns[i], self._object(rng), _limb(rng, own[i], time)))
        frames = self._background(rng, camera)
        seen = self._warp(rng, torch.stack([one[1] for one in layers]), np.stack([one[2] for one in layers]), camera)
        masks = torch.zeros(self.num_frames, num_objects, self.side, self.side, dtype=torch.bool)
        for (column, *_), rgba in zip(layers, seen, strict=True):
            alpha = rgba[:, 3:]
            frames = frames * (1 - alpha) + rgba[:, :3] * alpha
            covered = alpha[:, 0] > 0.5
            masks &= ~covered[:, None]
            if column >= 0:
                masks[:, column] |= covered
        frames = _filmed(rng, frames)
        if rng.random() < 0.5:
            frames, masks = _squeezed(rng, frames, masks)
        return frames.permute(0, 2, 3, 1).mul(255).byte().numpy(), masks.numpy()

    def _object(self, rng: np.random.Generator) -> Tensor:
        """(4, SIDE, SIDE) in 0..1, colour and opacity."""
        of_stamps = rng.random() < 0.4
        figures = self.stamps if of_stamps else self.figures
        figure = torch.from_numpy(figures[rng.integers(len(figures))]).permute(2, 0, 1).float() / 255
        colour, alpha = figure[:3], figure[3:]
        if rng.random() < 0.25:
            alpha = _outline(rng)
        kind = rng.random() * (2.5 if of_stamps else 1)
        if kind < 0.4:
            colour = self._patch(rng)
        elif kind < 0.6:
            colour = (colour + self._patch(rng)) / 2
        colour = _recoloured(rng, colour)
        if self.parts and rng.random() < self.parts:
            colour = self._in_parts(rng, colour)
        return torch.cat([colour, alpha])

    def _in_parts(self, rng: np.random.Generator, colour: Tensor) -> Tensor:
        """Colours (3, SIDE, SIDE) of which up to three parts are others: recoloured, of another picture, or plain."""
        where = torch.from_numpy(_fields(rng, SIDE, 1.6, 3)).float()
        height = torch.linspace(-1, 1, SIDE)[None, :, None]  # what lies above and below is often of two parts
        where = where + float(rng.choice([0, 2])) * height * torch.from_numpy(rng.normal(0, 1, (3, 1, 1))).float()
        for part in where[: int(rng.integers(1, 4))]:
            kind = rng.random()
            if kind < 0.35:
                other = _recoloured(rng, colour)
            elif kind < 0.65:
                other = _recoloured(rng, self._patch(rng))
            else:
                plain = torch.from_numpy(rng.random((3, 1, 1))).float()
                other = (plain + float(rng.uniform(0, 0.4)) * (colour.mean(0, keepdim=True) - 0.5)).clamp(0, 1)
            colour = torch.where(part > float(rng.uniform(-0.3, 0.8)), other, colour)
        return colour

    def _patch(self, rng: np.random.Generator) -> Tensor:
        """Colours (3, SIDE, SIDE): a part of a photograph, or noise with structures of many sizes."""
        if rng.random() < 0.25:
            return _noise(rng, SIDE)
        return self._part(rng, SIDE, 0.15, 0.6)

    def _part(self, rng: np.random.Generator, side: int, low: float, high: float) -> Tensor:
        photo = self.photos[rng.integers(len(self.photos))]
        size = max(24, int(min(photo.shape[:2]) * rng.uniform(low, high)))
        top, left = (int(rng.integers(length - size + 1)) for length in photo.shape[:2])
        part = torch.from_numpy(photo[top : top + size, left : left + size]).permute(2, 0, 1)[None].float() / 255
        part = F.interpolate(part, (side, side), mode="bilinear", antialias=size > side)[0]
        part = part.flip(2) if rng.random() < 0.5 else part
        return part.flip(1) if rng.random() < 0.15 else part

    def _background(self, rng: np.random.Generator, camera: np.ndarray) -> Tensor:
        """(T, 3, side, side), a photograph or noise under the camera's motion."""
        size = self.side * 3 // 2
        picture = _noise(rng, size) if rng.random() < 0.2 else self._part(rng, size, 0.4, 1.0)
        picture = _recoloured(rng, picture)
        # The camera's places as those of a picture of one and a half frames.
        theta = _inverse(camera * (1 / 1.5, 1 / 1.5, 1, 1), 1.5)
        grid = F.affine_grid(theta, [self.num_frames, 3, self.side, self.side], align_corners=False)
        return F.grid_sample(
            picture.expand(self.num_frames, -1, -1, -1), grid, padding_mode="reflection", align_corners=False
        )

    def _warp(self, rng: np.random.Generator, pictures: Tensor, motion: np.ndarray, camera: np.ndarray) -> Tensor:
        """Pictures (L, 4, SIDE, SIDE) as they are seen: (L, T, 4, side, side)."""
        count = len(pictures)
        zoom = np.exp(camera[:, 3])
        cos, sin = np.cos(camera[:, 2]), np.sin(camera[:, 2])
        x, y = motion[..., 0], motion[..., 1]
        placed = np.stack(
            [
                zoom * (cos * x - sin * y) + camera[:, 0],
                zoom * (sin * x + cos * y) + camera[:, 1],
                motion[..., 2] + camera[:, 2],
                motion[..., 3] + camera[:, 3],
            ],
            axis=-1,
        )
        theta = _inverse(placed.reshape(-1, 4), np.exp(placed[..., 3]).reshape(-1), scaled=True)
        grid = F.affine_grid(theta, [len(theta), 4, self.side, self.side], align_corners=False)
        # Bends: waves over the picture, whose phases go on with time.
        direction = torch.from_numpy(rng.normal(0, 2.2, (count, 1, 2, 2))).float()
        phase = torch.from_numpy(
            rng.uniform(0, 6, (count, 1, 2)) + rng.normal(0, 0.5, (count, 1, 2)) * np.arange(self.num_frames)[:, None]
        ).float()
        height = torch.from_numpy(rng.choice([0, 0.08, 0.16], (count, 1, 1))).float()
        grid = grid.unflatten(0, (count, self.num_frames)).flatten(2, 3)
        bent = grid + (height * torch.sin(grid @ direction + phase[:, :, None]).flatten(1, 2)).view_as(grid)
        bent = bent.flatten(0, 1).unflatten(1, (self.side, self.side))
        repeated = pictures.repeat_interleave(self.num_frames, dim=0)
        return F.grid_sample(repeated, bent, align_corners=False).unflatten(0, (count, self.num_frames))


def _camera(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """(T, 4): x and y in half frames, angle, and the logarithm of the scale."""
    pace = rng.choice([0, 0.3, 1, 2], p=[0.25, 0.25, 0.35, 0.15])
    velocity = pace * rng.normal(0, (0.04, 0.03, 0.015, 0.015))
    tempo = 1 if len(time) < 2 else time[1]
    shake = pace * tempo * rng.normal(0, (0.01, 0.01, 0.005, 0.004), (len(time), 4))
    return time * velocity + shake


def _motion(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """(T, 4) as of the camera, of an object; its scale is half of its side, in half frames."""
    pace = rng.choice([0.2, 1, 2.5], p=[0.25, 0.5, 0.25])
    start = [*rng.uniform(-0.75, 0.75, 2), rng.normal(0, 0.6), np.log(rng.uniform(0.12, 0.32) * rng.choice([1, 2.2]))]
    velocity = pace * rng.normal(0, (0.05, 0.035, 0.04, 0.02))
    turn = pace * rng.normal(0, (0.008, 0.008, 0.01, 0.004))
    return start + time * velocity + time**2 * turn


def _limb(rng: np.random.Generator, body: np.ndarray, time: np.ndarray) -> np.ndarray:
    """The motion of a part that swings at a body's edge."""
    swing = rng.uniform(0, 6) + rng.normal(0, 0.35) + rng.normal(0, 0.25) * time[:, 0]
    reach = 0.75 * np.exp(body[:, 3])
    limb = body.copy()
    limb[:, 0] += reach * np.cos(body[:, 2] + swing)
    limb[:, 1] += reach * np.sin(body[:, 2] + swing)
    limb[:, 2] += swing
    limb[:, 3] += np.log(rng.uniform(0.35, 0.7))
    return limb


def _inverse(placed: np.ndarray, size: np.ndarray | float, scaled: bool = False) -> Tensor:
    """From places in the frame to places in a picture, (…, 2, 3), for `affine_grid`."""
    cos, sin = np.cos(placed[:, 2]), np.sin(placed[:, 2])
    scale = size if scaled else size * np.exp(placed[:, 3])
    rows = np.stack([cos, sin, -sin, cos], axis=-1).reshape(-1, 2, 2) / np.reshape(scale, (-1, 1, 1))
    shift = -rows @ placed[:, :2, None]
    return torch.from_numpy(np.concatenate([rows, shift], axis=2)).float()


def _fields(rng: np.random.Generator, side: int, low: float, high: float) -> np.ndarray:
    """Three fields (3, side, side) of noise of mean 0 and variance 1, whose power falls with frequency."""
    y, x = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    spectrum = rng.normal(size=(3, side, len(x))) * np.exp(2j * np.pi * rng.random((3, side, len(x))))
    fields = np.fft.irfft2(spectrum / (np.hypot(x, y) + 1 / side) ** rng.uniform(low, high), (side, side))
    return (fields - fields.mean((1, 2), keepdims=True)) / fields.std((1, 2), keepdims=True)


def _noise(rng: np.random.Generator, side: int) -> Tensor:
    """Colours (3, side, side) of noise whose power falls with frequency, at times in patches with sharp edges."""
    fields = _fields(rng, side, 0.8, 1.9)
    if rng.random() < 0.4:
        fields = np.round(fields * rng.uniform(0.8, 2)) / 2
    mixed = np.einsum("ij,jhw->ihw", rng.normal(0, 0.12, (3, 3)) + 0.1, fields)
    return torch.from_numpy(mixed + rng.uniform(0.25, 0.75, (3, 1, 1))).float().clamp(0, 1)


def _outline(rng: np.random.Generator) -> Tensor:
    """The opacity of a smooth random shape (1, SIDE, SIDE)."""
    angle = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(angle, angle, indexing="ij")
    theta, radius = torch.atan2(y, x), torch.hypot(x, y)
    edge = torch.full_like(theta, 0.62)
    for order in range(1, 7):
        edge = edge + float(rng.normal(0, 0.16 / order)) * torch.cos(order * theta + float(rng.uniform(0, 6)))
    return ((edge.clamp(0.2, 0.95) - radius) * 30).clamp(0, 1)[None]


def _recoloured(rng: np.random.Generator, colour: Tensor) -> Tensor:
    if rng.random() < 0.5:
        colour = colour[torch.from_numpy(rng.permutation(3))]
    if rng.random() < 0.15:
        colour = colour.mean(0, keepdim=True).expand(3, -1, -1)
    if rng.random() < 0.1:
        colour = 1 - colour
    gain, shift = rng.uniform(0.5, 1.2, (3, 1, 1)) * rng.uniform(0.6, 1.3), rng.uniform(-0.12, 0.2)
    return (colour.clamp(0, 1) ** float(np.exp(rng.normal(0, 0.3))) * torch.from_numpy(gain).float() + shift).clamp(
        0, 1
    )


def _filmed(rng: np.random.Generator, frames: Tensor) -> Tensor:
    """Light that changes, blur, and noise."""
    count, _, height, width = frames.shape
    drift = 1 + rng.normal(0, 0.03, (count, 1, 1, 1)) + rng.normal(0, 0.02) * np.arange(count)[:, None, None, None]
    side = np.linspace(*rng.uniform(0.75, 1.15, 2), width)
    frames = frames * torch.from_numpy(drift * side).float()
    if rng.random() < 0.3:
        kernel = (3, 1) if rng.random() < 0.3 else (1, 3) if rng.random() < 0.5 else (3, 3)
        frames = F.avg_pool2d(frames, kernel, 1, (kernel[0] // 2, kernel[1] // 2), count_include_pad=False)
    if rng.random() < 0.6:
        noise = torch.from_numpy(
            rng.standard_normal((count, 1 if rng.random() < 0.5 else 3, height, width), np.float32)
        )
        frames = frames + float(rng.uniform(0, 0.05)) * noise
    return frames.clamp(0, 1)


def _squeezed(rng: np.random.Generator, frames: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Part of the height, or of the width, as large as all: what the model sees of wide and of tall frames."""
    side = frames.shape[-1]
    length = int(side * rng.uniform(0.5, 1))
    start, axis = int(rng.integers(side - length + 1)), 2 if rng.random() < 0.8 else 3
    frames, masks = frames.narrow(axis, start, length), masks.narrow(axis, start, length)
    frames = F.interpolate(frames, (side, side), mode="bilinear", align_corners=False)
    return frames, F.interpolate(masks.float(), (side, side), mode="bilinear", align_corners=False) > 0.5


class CutOutsLayout(Layout):
    """Datasets of the kind "cutouts"."""

    @property
    def read(self) -> Callable[..., CutOuts]:
        return CutOuts


LAYOUT = CutOutsLayout("cutouts", "")
