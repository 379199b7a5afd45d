"""Small datasets of every kind, damaged at random and read in a process of little memory and time."""

import gc
import gzip
import json
import multiprocessing
import random
import resource
import shutil
import signal
import struct
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from itertools import count, islice
from pathlib import Path

import numpy as np
import psutil

from helpers import layouts
from helpers.formats import odd_videos
from samoe_hf.data import load_videos, read_video, write_video
from samoe_hf.data.formats.convert import write_videos
from samoe_hf.data.layouts import WRITTEN
from samoe_hf.data.registry import read_yaml, videos_from_entry
from samoe_hf.data.schema import Video

GIGABYTE, SECONDS = 2**30, 5
ABSURD = [
    None, True, -1, 0, 1, 1.5, 10**6, 10**12, 10**30, 1e308, float("nan"), float("inf"), "", "x", "é\0", "1" * 300,
    "../../x", "/etc/passwd", [], [[]], {}, [None], {"size": [10**6, 10**6], "counts": "1"}, [[1e9, -1e9] * 5],
]  # fmt: skip


def make_yaml(root: Path) -> dict:
    root.mkdir(parents=True)
    (root / "run.yaml").write_text(
        "eval_data:\n  - {kind: synthetic, num_videos: 2, num_frames: 2, image_size: [16, 16]}\nlearning_rate: 1.0e-4\n"
    )
    return {"yaml": root / "run.yaml"}


def make_video(root: Path, suffix: str) -> dict:
    root.mkdir(parents=True)
    path = root / f"clip{suffix}"
    write_video(path, (np.full((*layouts.SIZE, 3), 20 * i, np.uint8) for i in range(6)))
    return {"video": path}


def make_format(kind: str, root: Path) -> dict:
    (root / kind).mkdir(parents=True)
    write_videos(kind, odd_videos(root / "frames")[1:], root / kind)
    shutil.rmtree(root / "frames")
    return {"kind": kind, "root": root / kind} | ({"split": "default"} if kind == "coco" else {})


KINDS = ("frames", "davis", "sa_v_val", "sa_v", "ocid", "npz", "nifti", "coco", "dataset")
MAKERS: dict[str, Callable[[Path], dict]] = {
    **{kind: getattr(layouts, f"make_{kind}") for kind in KINDS},
    "nifti_plain": partial(layouts.make_nifti, suffix=".nii"),
    **{f"{kind}_video": partial(make_format, kind) for kind in WRITTEN if kind != "davis"},
    "yaml": make_yaml,
    "video": partial(make_video, suffix=".mp4"),
    "matroska": partial(make_video, suffix=".mkv"),
}


# --- damage: each takes bytes and a random generator, and returns other bytes


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    start = rng.choice([0, 0, max(len(data) - 2000, 0)])  # headers are at the start, tables of MP4 and ZIP at the end
    for _ in range(rng.choice([1, 3, 10, 50])):
        damaged[rng.randrange(start, min(start + 2000, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(max(min(len(data), 600) - 8, 1)), rng.choice([1, 2, 4, 8])
    return data[:start] + rng.choice([b"\xff", b"\0", b"\x7f", b"\x80"]) * length + data[start + length :]


def swap_header(data: bytes, rng: random.Random) -> bytes:
    headers = [
        b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF", b"PK\x03\x04", b"\x1f\x8b\x08\0", b"\0\0\0\x20ftypisom",
        b"GIF89a\xff\xff\xff\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%touch executed) (w) file\n", b"#EXTM3U\n",
        b"ffconcat version 1.0\nfile x\n", b"\x93NUMPY\x01\0", b"\x80\x04cos\nsystem\n", 
        b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    ]  # fmt: skip
    header = rng.choice(headers)
    return header + data[len(header) :]


def replace(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"\0" * 5000, b"text\n" * 300, rng.randbytes(3000), b"[" * 100_000, b"\xff\xfe" * 400])


def damage_png(data: bytes, rng: random.Random) -> bytes:
    """Another size, depth or type of colour, with the right check sum."""
    size = rng.choice([(100_000, 100_000), (2**31 - 1, 1), (0, 5), (9000, 9000), (13_000, 13_000), (32, 25)])
    depth, colour, interlace = rng.choice([1, 2, 4, 8, 16, 9]), rng.choice([0, 2, 3, 4, 6, 7]), rng.choice([0, 1, 2])
    header = b"IHDR" + struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlace)
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """Absurd values in one to three places."""
    content = json.loads(data)
    for _ in range(rng.choice([1, 1, 3])):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], (dict, list)) and rng.random() < 0.85:
                node = node[key]
            else:
                node[key] = rng.choice(ABSURD)
                break
    return json.dumps(content).encode()


def damage_npz(data: bytes, rng: random.Random) -> bytes:
    """Headers of arrays that declare other shapes and types, objects, and zeros that take much more than their file."""
    shape = rng.choice(
        [(4, 24, 32), (10**5, 10**5, 10**5), (2**62, 4, 4), (-1, 24, 32), (4,), (4, 24, 32, 3), (0, 24, 32)]
    )
    descr = rng.choice(["|u1", "<i8", "<f8", "<f2", "|O", "<c16", "|S5", "<M8[s]", "|b1", ">i4"])
    damaged = rng.choice(["imgs", "gts", "spacing", "both", "bomb"])
    arrays = {"imgs": ((4, 24, 32), "<i2"), "gts": ((4, 24, 32), "|u1"), "spacing": ((3,), "<f8")}
    if damaged == "bomb":
        shape, descr = (600, 600, 600), "|u1"
    for name in ("imgs", "gts") if damaged in ("both", "bomb") else (damaged,):
        arrays[name] = (shape, descr)
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    path, method = BytesIO(), zipfile.ZIP_DEFLATED if damaged == "bomb" else method
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name, (shape, descr) in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                header = {"shape": shape, "descr": descr, "fortran_order": rng.random() < 0.3}
                np.lib.format.write_array_header_1_0(file, header)
                for _ in range(206 if damaged == "bomb" and name != "spacing" else 1):
                    file.write(b"\0" * 2**20 if damaged == "bomb" else rng.randbytes(rng.choice([100, 24_576])))
    return path.getvalue()


def damage_nifti(data: bytes, rng: random.Random) -> bytes:
    """Absurd values in a header's fields."""
    is_packed = data.startswith(b"\x1f\x8b")
    damaged = bytearray(gzip.decompress(data) if is_packed else data)
    fields = {
        "sizeof_hdr": (0, "<i"), "dim0": (40, "<h"), "dim": (42, "<3h"), "datatype": (70, "<h"), "bitpix": (72, "<h"),
        "pixdim": (76, "<4f"), "vox_offset": (108, "<f"), "slope": (112, "<2f"), "qform": (252, "<2h"),
        "srow": (280, "<12f"), "magic": (344, "<4s"), "extension": (348, "<4B2i"),
    }  # fmt: skip
    for _ in range(rng.choice([1, 2])):
        offset, form = fields[rng.choice(list(fields))]
        count = len(struct.unpack_from(form, damaged, offset))
        integers = [0, -1, 1, 2, 7, 16, 32, 128, 255, 1024, 2304, 30_000, 32_767]
        numbers = [0.0, -1.0, float("nan"), float("inf"), 1e30, 1e-30, 352.0, 1e9]
        if form == "<4s":
            values = [rng.choice([b"ni1\0", b"n+2\0", b"\0\0\0\0", b"n+1\0"])]
        elif form == "<4B2i":
            values = [1, 0, 0, 0, rng.choice([2**31 - 1, -16, 0, 16]), 6]
        else:
            values = [rng.choice(numbers if form[-1] == "f" else integers) for _ in range(count)]
        struct.pack_into(form, damaged, offset, *values)
    return gzip.compress(damaged) if is_packed else bytes(damaged)


YAML_TEXTS = [
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\neval_data: [*c, *c]\n", "eval_data: &x [*x]\n",
    "eval_data: {kind: synthetic}\n", "eval_data: [{knd: davis}]\n",
    "eval_data: [{kind: synthetic, num_videos: 1.0e+12, num_frames: 2}]\n",
    "eval_data: [{kind: synthetic, num_videos: .nan, num_frames: 2}]\n",
    "eval_data: [{kind: frames, root: !!python/object/apply:os.system ['touch executed']}]\n", "? [1, 2]\n: 3\n",
    "eval_data: [{1: 2, kind: davis, root: /}]\n", "a: 2001-99-99\n", "a: !!binary x\n",
]  # fmt: skip


def damage_yaml(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(YAML_TEXTS).encode()


BYTES = [truncate, flip_bits, flip_bits, overwrite, overwrite, swap_header, replace]


SPECIAL = {
    ".json": [damage_json] * 12, ".png": [damage_png] * 4, ".npz": [damage_npz] * 7, ".nii": [damage_nifti] * 7,
    ".gz": [damage_nifti] * 7, ".yaml": [damage_yaml] * 5,
}  # fmt: skip


def damage(root: Path, rng: random.Random) -> str:
    """Damages one or two files in place; returns what was done to which."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    done = []
    for path in rng.sample(files, min(len(files), rng.choice([1, 1, 2]))):
        change = rng.choice([*BYTES, *SPECIAL.get(path.suffix, [])])
        path.write_bytes(change(path.read_bytes(), rng))
        done.append(f"{path.name}: {change.__name__}")
    return ", ".join(done)


# --- reading


def read(options: dict) -> None:
    """Opens what there is and reads a part of it; asserts that it is plausible."""
    if "video" in options:
        frames = read_video(options["video"])
        for index in (0, len(frames) - 1, len(frames) // 2):
            assert frames[index].shape == (*frames.size, 3) and frames[index].dtype == np.uint8
        return
    if "yaml" in options:
        entries = read_yaml(options["yaml"]).get("eval_data") or []
        videos = [v for entry in entries for v in list(videos_from_entry(entry, str(options["yaml"])))[:2]]
    else:
        videos = load_videos(**options)
    for i in range(min(len(videos), 2)):
        check(videos[i])


def check(video: Video) -> None:
    ids = video.object_ids
    assert all(isinstance(i, int) and i > 0 for i in ids) and len(set(ids)) == len(ids)
    for frame in {0, len(video) - 1}:
        pixels = video.frames[frame]
        assert pixels.shape == (*video.size, 3) and pixels.dtype == np.uint8
    for frame in video.annotated_frames[:2] + video.annotated_frames[-1:]:
        visible = video.visible(frame)
        masks = video.masks(frame, visible[:3])
        assert set(visible) <= set(ids) and masks.shape == (len(visible[:3]), *video.size) and masks.dtype == bool
        assert masks.any(axis=(1, 2)).all()
    assert video.spacing is None or all(0 < length < float("inf") for length in video.spacing)


def outcomes_in_a_process(
    make_cases: Callable[..., Iterator], folder: Path, number: int, *arguments: object
) -> Counter:
    """How often each outcome came of so many damaged cases, which are tried in a process of their own.

    It may take 1 GB beyond what it takes at the start, and 5 seconds of computing for each case; where it takes more it
    ends. To `folder/log` goes a line of JSON before and after each case: its name, then what came of it.

    Args:
        make_cases: of `folder` and `arguments`; yields once when it is prepared, and then cases: their name, their
            folder, which is removed afterwards, and what tries them.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_try_cases, args=(make_cases, folder, number, *arguments)
    )
    process.start()
    process.join()
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert process.exitcode == 0, f"ended with {process.exitcode} after {lines[-1]}"
    results = [(case["case"], result) for case, result in zip(lines[::2], lines[1::2], strict=True)]
    wrong = [f"{case}: {result['error']}" for case, result in results if result["outcome"] in ("raw", "not named")]
    assert not wrong, f"{len(wrong)} of {number}\n" + "\n".join(wrong[:8])
    assert len(results) == number
    return Counter(result["outcome"] for _, result in results)


def _try_cases(make_cases: Callable[..., Iterator], folder: Path, number: int, *arguments: object) -> None:
    warnings.simplefilter("ignore")
    gc.freeze()  # what the parent process held, some of which cannot be freed in a fork
    cases = make_cases(folder, *arguments)
    next(cases)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, used + GIGABYTE))
    for signal_of_timer in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(signal_of_timer, signal.SIG_DFL)  # ends the process, in whichever library it is
    with open(folder / "log", "w", buffering=1) as log:
        for index, (name, case, attempt) in enumerate(islice(cases, number)):
            log.write(json.dumps({"case": f"{index} {name}"}) + "\n")
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, 60 * SECONDS)  # where it waits; a busy machine may take long, too
            outcome = attempt()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            log.write(json.dumps(outcome) + "\n")
            shutil.rmtree(case)


def damaged_datasets(folder: Path, seed: int) -> Iterator[tuple[str, Path, Callable[[], dict]] | None]:
    """Damaged datasets, for [`outcomes_in_a_process`]."""
    templates = {kind: make(folder / kind) for kind, make in MAKERS.items()}
    for options in templates.values():
        read(options)  # unharmed, all can be read; also imports what is imported late
    yield
    for number in count():
        kind = list(MAKERS)[number % len(MAKERS)]
        rng, case = random.Random(f"{seed} {number}"), folder / f"case_{number}"
        shutil.copytree(folder / kind, case)
        options = {  # with the paths of the copy
            name: case / value.relative_to(folder / kind) if isinstance(value, Path) else value
            for name, value in templates[kind].items()
        }
        yield f"{kind}: {damage(case, rng)}", case, partial(try_to_read, options, case)


def try_to_read(options: dict, case: Path) -> dict:
    try:
        read(options)
    except (ValueError, OSError) as error:
        names = [str(path) for path in (case, *case.rglob("*"))]
        if options.get("kind") == "dataset":
            names.append("shapes_0_0000")  # the videos' ids
        is_named = any(name in str(error) for name in names)
        return {"outcome": "refused" if is_named else "not named", "error": f"{type(error).__name__}: {error}"}
    except BaseException:
        return {"outcome": "raw", "error": traceback.format_exc()}
    return {"outcome": "read"}
