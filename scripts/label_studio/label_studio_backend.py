"""A backend for Label Studio: boxes on a video are tracked, and clicks and boxes on an image become brushes.

    python scripts/label_studio/label_studio_backend.py MODEL --data FOLDER [--data FOLDER]

See the README beside this file.
"""

import argparse
import contextlib
import json
import logging
import signal
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse
from xml.etree import ElementTree

import numpy as np
import torch

from samoe_hf import VideoSession
from samoe_hf.data.formats.label_studio import encode_brush
from samoe_hf.data.frames import DAMAGE, FrameSequence, SampleError, check_inside, named_errors
from samoe_hf.data.shapes import cropped
from samoe_hf.data.video_io import read_video
from samoe_hf.errors import InputError, input_errors
from samoe_hf.inference import VideoPrompt, check_masks, check_prompts, load_tracker, masks_of

logger = logging.getLogger("label_studio_backend")

DRAWN = ("videorectangle", "keypointlabels", "keypoint", "rectanglelabels", "rectangle")


@dataclass
class Asked:
    """What a request asks for.

    Attributes:
        drawn: the results that Label Studio sent: the regions of a video, or what was drawn of one object of an image.
        frames: of the video, or the image alone.
        prompts: in pixels; object 1 is the first of `drawn`.
        rate: frames per second of the labelling config, by which Label Studio numbers frames; None for an image.
        brush, label: name of the control and label for an object of an image.
    """

    drawn: list[dict]
    frames: FrameSequence
    prompts: list[VideoPrompt]
    rate: float | None = None
    brush: str = ""
    label: str = ""


class Backend:
    """Answers Label Studio's requests for predictions.

    Args:
        version: of the model, for Label Studio.
        folders: where files may be: of uploads (`…/label-studio/media`) and of local storage.
        num_frames: so many frames are tracked after the last keyframe of each region.
    """

    def __init__(self, model: Any, processor: Any, version: str, folders: Sequence[Path], num_frames: int):
        self.model, self.processor, self.version, self.num_frames = model, processor, version, num_frames
        self.folders = [folder.resolve() for folder in folders]

    @torch.inference_mode()
    def predict(self, request: Any) -> list[dict]:
        """The prediction for a request's task; none where nothing is drawn.

        Raises:
            InputError: the request, or what it names, cannot be used.
        """
        with named_errors("the request", "not one of Label Studio's", (*DAMAGE, ElementTree.ParseError)):
            asked = self.read(request)
        if asked is None:
            return []
        check_prompts(asked.prompts, len(asked.frames), asked.frames.size)
        session = VideoSession(asked.frames, self.processor, inference_device=self.model.device, dtype=self.model.dtype)
        for prompt in asked.prompts:
            prompt.add_to(session, self.processor)
        results = self.segment(asked, session) if asked.rate is None else self.track(asked, session, asked.rate)
        score = float(np.mean([one["score"] for one in results])) if results else 0.0
        return [{"result": results, "score": score, "model_version": self.version}]

    # --- Reading

    def read(self, request: Any) -> Asked | None:
        """A request, checked; None where nothing is drawn. Errors are those of `named_errors`."""
        context = request["params"].get("context") or {}
        drawn = [one for one in context.get("result") or () if one["type"] in DRAWN]
        if not drawn:
            return None
        controls, shown = ElementTree.fromstring(request["label_config"]), drawn[0]["to_name"]
        tag = next((one for one in controls.iter() if one.get("name") == shown), None)
        field = "" if tag is None else tag.get("value", "")
        if tag is None or tag.tag not in ("Image", "Video") or field[:1] != "$":
            raise SampleError(f"the labelling config has no <Image> or <Video> {shown!r} with a value $…")
        frames = read_video(self.file(request["tasks"][0]["data"][field[1:]]))
        if tag.tag == "Video":
            rate = float(tag.get("framerate") or tag.get("frameRate") or 24)
            regions = [one for one in drawn if one["type"] == "videorectangle"]
            prompts = [
                VideoPrompt(number, int(key["frame"]) - 1, box=box_of(key, frames.size))
                for number, region in enumerate(regions, 1)
                for key in region["value"]["sequence"]
            ]
            return Asked(regions, frames, prompts, rate)
        brushes = [one.attrib for one in controls.iter("BrushLabels") if one.get("toName") == shown]
        if not brushes:
            raise SampleError(f"the labelling config has no <BrushLabels> for {shown!r}")
        labels = [name for one in drawn for name in one["value"].get(one["type"]) or one["value"].get("labels") or ()]
        if not labels:
            raise SampleError("no label is chosen for what is drawn")
        return Asked(drawn, frames, [image_prompt(drawn, frames.size)], None, brushes[0]["name"], labels[0])

    def file(self, url: str) -> Path:
        """The file that a task's address names: an upload, or a file of local storage."""
        parsed = urlparse(url)
        name = unquote(parsed.path).removeprefix("/data/")
        if name.strip("/") == "local-files":
            name = parse_qs(parsed.query).get("d", [""])[0]
        if parsed.scheme or parsed.netloc or not parsed.path.startswith("/data/"):
            raise SampleError(f"{url!r} is no upload (/data/upload/…) and no local file (/data/local-files/?d=…)")
        check_inside(name, "the task")
        for folder in self.folders:
            path = (folder / name).resolve()
            if path.is_file() and path.is_relative_to(folder):
                return path
        raise SampleError(f"there is no file {name!r} in the folders of --data")

    # --- Answers

    def track(self, asked: Asked, session: VideoSession, rate: float) -> list[dict]:
        """The regions of a video, each with a box on every frame from its first keyframe on that shows it."""
        frames, count = asked.frames, len(asked.drawn)
        keys = [{p.frame_idx for p in asked.prompts if p.object_id == number} for number in range(1, count + 1)]
        if not all(keys):
            raise InputError("A region has no keyframe.")
        stops = [min(max(own) + self.num_frames + 1, len(frames)) for own in keys]
        first, last = min(map(min, keys)), max(stops) - 1
        for t in (first, last):
            time = frames.time(t)
            if time is not None and abs(time * rate - t) > 1:
                raise InputError(
                    f"Frame {t + 1} of the video is at {time:.3f} s, which is frame {time * rate + 1:.1f} of Label "
                    f'Studio; the <Video> of the labelling config needs framerate="{frames.fps or t / time:.6g}".'
                )
        boxes: list[dict[int, dict | None]] = [{} for _ in keys]
        scores: list[list[float]] = [[] for _ in keys]
        for output in self.model.propagate_from_prompts_iterator(session, start_frame_idx=first):
            masks, t = self.masks(output, frames.size), output.frame_idx
            for i, mask in enumerate(masks):
                if min(keys[i]) <= t < stops[i]:
                    boxes[i][t] = place_of(mask)
                    scores[i].append(output.iou_scores[i].item())
            if t == last:
                break
        results = []
        for region, own, found, stop in zip(asked.drawn, boxes, scores, stops, strict=True):
            sequence = sequence_of(region["value"]["sequence"], own, rate, is_cut=stop < len(frames))
            value = {**region["value"], "sequence": sequence}
            results.append({**region, "value": value, "score": float(np.mean(found))})
        return results

    def segment(self, asked: Asked, session: VideoSession) -> list[dict]:
        """A brush for the object of an image; none where the model sees none."""
        output = self.model(session, frame_idx=0)
        (mask,) = self.masks(output, asked.frames.size)
        result = {
            "id": uuid.uuid4().hex[:10],
            "type": "brushlabels",
            "from_name": asked.brush,
            "to_name": asked.drawn[0]["to_name"],
            "original_width": mask.shape[1],
            "original_height": mask.shape[0],
            "image_rotation": 0,
            "value": {"format": "rle", "rle": encode_brush(mask), "brushlabels": [asked.label]},
            "score": output.iou_scores[0].item(),
        }
        return [result] if mask.any() else []

    def masks(self, output: Any, size: tuple[int, int]) -> np.ndarray:
        """The masks (objects, H, W) bool of an output."""
        check_masks(output, self.model.dtype)
        logits = self.processor.post_process_masks([output.pred_masks], [size], binarize=False)[0][:, 0]
        return masks_of(logits.float().cpu().numpy())


def box_of(value: dict, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box (x0, y0, x1, y1) in pixels of one in percent of an image's size (height, width)."""
    if value.get("rotation"):
        raise SampleError(f"a box is turned by {value['rotation']} degrees; draw it upright")
    x, y, width, height = (float(value[name]) / 100 for name in ("x", "y", "width", "height"))
    return x * size[1], y * size[0], (x + width) * size[1], (y + height) * size[0]


def image_prompt(drawn: Sequence[dict], size: tuple[int, int]) -> VideoPrompt:
    """All that is drawn of one object of an image of a size (height, width)."""
    points, labels, boxes = [], [], []
    for one in drawn:
        value, shown = one["value"], (one["original_height"], one["original_width"])
        if shown != size or one.get("image_rotation"):
            turned = one.get("image_rotation") or 0
            raise SampleError(f"the image is labelled as {shown} pixels, turned by {turned} degrees, but has {size}")
        if one["type"].startswith("rectangle"):
            boxes.append(box_of(value, size))
            continue
        x, y = float(value["x"]) / 100 * size[1], float(value["y"]) / 100 * size[0]
        points.append((min(x, size[1] - 1), min(y, size[0] - 1)))  # 100 % is the edge
        labels.append(int(one.get("is_positive", True)))
    if len(boxes) > 1:
        raise SampleError(f"{len(boxes)} boxes are drawn of one object")
    return VideoPrompt(1, 0, points, labels, boxes[0] if boxes else None)


def place_of(mask: np.ndarray) -> dict | None:
    """The box around a mask (H, W), in percent of its size; None where nothing is seen."""
    if not mask.any():
        return None
    patch, left, top = cropped(mask)
    x, y = 100 / mask.shape[1], 100 / mask.shape[0]
    return {"x": left * x, "y": top * y, "width": patch.shape[1] * x, "height": patch.shape[0] * y, "rotation": 0}


def sequence_of(drawn: Sequence[dict], boxes: dict[int, dict | None], rate: float, is_cut: bool) -> list[dict]:
    """Keyframes of a region: those that were drawn, as they are, and a box on each other frame that shows the object.

    A keyframe after which the object is not seen is not `enabled`, and neither is the last one if the video goes on.

    Args:
        drawn: keyframes of Label Studio.
        boxes: frame, from 0 on -> the box that was tracked there.
    """
    keys = {int(key["frame"]) - 1: key for key in drawn}
    sequence: list[dict] = []
    is_there = True
    for t, box in sorted(boxes.items()):
        if t in keys:
            is_there = keys[t].get("enabled", True)
            sequence.append(dict(keys[t]))
        elif is_there and box is not None:
            sequence.append({"frame": t + 1, "time": (t + 1) / rate, "enabled": True, **box})
        elif sequence[-1]["frame"] == t:
            sequence[-1]["enabled"] = False
    if is_cut:
        sequence[-1]["enabled"] = False
    return sequence


# --- The server


class Server(ThreadingHTTPServer):
    """Serves a backend at an address: host, and port or 0 for a free one. It answers one prediction at a time."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], backend: Backend):
        self.backend, self.one_runs = backend, threading.Lock()
        super().__init__(address, Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers requests; an error has its message as the reason of its status, which Label Studio passes on."""

    server: Server

    def do_GET(self) -> None:
        """Says that the backend is there."""
        is_known = self.path in ("/", "/health")
        self._answer(200 if is_known else 404, {"status": "UP", "model_class": "VideoSession"} if is_known else {})

    def do_POST(self) -> None:
        """Answers with a prediction, or with the model's version; annotations are not learned from."""
        if self.path not in ("/predict", "/setup", "/webhook"):
            return self._answer(404, {})
        try:
            with input_errors():
                self._answer(200, self._answer_of(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        except (InputError, json.JSONDecodeError) as error:
            message = " ".join(str(error).split())
            logger.warning("%s", message)
            self._answer(400, {"error": message}, message.encode("ascii", "replace").decode())

    def _answer_of(self, request: Any) -> dict:
        if self.path == "/predict":
            with self.server.one_runs:
                return {"results": self.server.backend.predict(request)}
        return {"model_version": self.server.backend.version} if self.path == "/setup" else {"status": "ignored"}

    def _answer(self, status: int, body: dict, reason: str | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status, reason)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves a model until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a file or a repository on the Hub")
    parser.add_argument("--data", type=Path, action="append", required=True, help="where the videos and images are")
    parser.add_argument("--frames", type=int, default=100, help="so many are tracked after a region's last keyframe")
    parser.add_argument("--port", type=int, default=9090)
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    try:
        with input_errors(parsed.model):
            model, processor = load_tracker(parsed.model, "cuda" if torch.cuda.is_available() else "cpu")
        backend = Backend(model, processor, Path(parsed.model).name, parsed.data, parsed.frames)
        with input_errors(f"--port {parsed.port}"):
            server = Server(("127.0.0.1", parsed.port), backend)
    except InputError as error:
        parser.error(str(error))
    with server:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        logger.info("Label Studio's backend is at http://%s:%s until Ctrl+C", *server.server_address[:2])
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
