"""Gathers the pictures that the small base's natural videos are made of, from packages with free licences.

    pip install scikit-image scikit-learn matplotlib PyWavelets OpenEXR
    npm pack @pmndrs/assets @lobehub/fluent-emoji-3d
    apt-get download tuxpaint-stamps-default mate-backgrounds
    for package in *.deb; do dpkg -x $package debian; done
    python scripts/small_base/pictures.py pmndrs-*.tgz lobehub-*.tgz debian --output outputs/pictures.npz

The README beside this file names each picture's licence. `photos` are of any size; `figures` (N, 96, 96, 4) are
cut-outs with their opacity, the emoji and regions of the photographs; `stamps` are Tux Paint's.
"""

import argparse
import base64
import io
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 96  # of a figure, in pixels
LARGEST = 640  # longer side of a photograph
OF_SKIMAGE = (
    *(f"{name}.png" for name in ("astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass")),
    *(f"{name}.png" for name in ("gravel", "ihc")),
    *(f"{name}.jpg" for name in ("hubble_deep_field", "retina", "rocket")),
)


def package_photos() -> Iterator[Image.Image]:
    """Photographs that are files of Python packages."""
    import matplotlib
    import pywt.data
    import skimage

    for name in OF_SKIMAGE:
        yield Image.open(Path(skimage.__file__).parent / "data" / name)
    for name in ("china.jpg", "flower.jpg"):
        yield Image.open(Path(find_spec("sklearn").origin).parent / "datasets" / "images" / name)
    yield Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    for photo in (pywt.data.aero(), pywt.data.ascent()):
        yield Image.fromarray(np.asarray(photo, dtype=np.uint8))


def panoramas(archive: Path) -> Iterator[Image.Image]:
    """Poly Haven's panoramas in `@pmndrs/assets`, as a camera would expose them."""
    import OpenEXR

    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".exr.js"):
                text = tar.extractfile(member).read().decode()
                data = base64.b64decode(text.split("base64,")[1].rstrip("'\"`;\n "))
                with tempfile.NamedTemporaryFile(suffix=".exr") as file:
                    Path(file.name).write_bytes(data)
                    pixels = OpenEXR.File(file.name).channels()["RGB"].pixels.astype(np.float32)
                exposed = np.clip(pixels / (2 * np.median(pixels) + 1e-6), 0, None)
                yield Image.fromarray((255 * (exposed / (1 + exposed)) ** 0.6).astype(np.uint8))


def stamps(folder: Path) -> list[np.ndarray]:
    """Tux Paint's stamps, most of them photographs of animals, plants, vehicles and tools."""
    figures = []
    for path in sorted(folder.glob("usr/share/tuxpaint/stamps/**/*.png")):
        if not {"symbols", "cartoon"} & {*path.parts}:
            picture = Image.open(path).convert("RGBA")
            square = Image.new("RGBA", (max(picture.size),) * 2)
            square.paste(picture, tuple((max(picture.size) - length) // 2 for length in picture.size))
            figures.append(np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)))
    return figures


def emoji(archive: Path) -> Iterator[np.ndarray]:
    """Microsoft's emoji in three dimensions, without those that differ in the colour of skin only."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".webp") and "1f3f" not in member.name:
                picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")
                yield np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def regions(photo: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of a photograph along its edges, each as large as a figure."""
    from skimage.measure import regionprops
    from skimage.segmentation import felzenszwalb

    for scale in (150, 600):
        labels = felzenszwalb(photo, scale=scale, sigma=0.8, min_size=photo.shape[0] * photo.shape[1] // 400)
        for region in regionprops(labels + 1):
            top, left, bottom, right = region.bbox
            if max(bottom - top, right - left) > 0.7 * max(photo.shape[:2]) or region.solidity < 0.6:
                continue
            alpha = 255 * region.image_filled.astype(np.uint8)
            cut = np.dstack([photo[top:bottom, left:right], alpha])
            side = max(cut.shape[:2])
            square = np.zeros((side, side, 4), np.uint8)
            y, x = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
            square[y : y + cut.shape[0], x : x + cut.shape[1]] = cut
            yield np.asarray(Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="archive of @pmndrs/assets")
    parser.add_argument("emoji", type=Path, help="archive of @lobehub/fluent-emoji-3d")
    parser.add_argument("debian", type=Path, help="folder with tuxpaint-stamps-default and mate-backgrounds")
    parser.add_argument("--output", required=True, type=Path)
    parsed = parser.parse_args(arguments)
    stamped = stamps(parsed.debian)
    if not stamped:
        parser.error(f"{parsed.debian} must hold what `dpkg -x` gives of tuxpaint-stamps-default, but has no stamps")
    photos = []
    nature = sorted(parsed.debian.glob("usr/share/backgrounds/mate/nature/*.jpg"))
    for picture in (*package_photos(), *panoramas(parsed.assets), *map(Image.open, nature)):
        picture = picture.convert("RGB")
        picture.thumbnail((LARGEST, LARGEST))
        photos.append(np.asarray(picture))
    cut = [*emoji(parsed.emoji), *(figure for photo in photos for figure in regions(photo))]
    figures, stamped = (
        np.stack([figure for figure in kind if 0.08 < (figure[..., 3] > 127).mean() < 0.95]) for kind in (cut, stamped)
    )
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"photo_{i:03d}": photo for i, photo in enumerate(photos)}
    np.savez(parsed.output, figures=figures, stamps=stamped, **arrays)
    print(f"{len(photos)} photographs, {len(figures)} figures, {len(stamped)} stamps")


if __name__ == "__main__":
    main()
