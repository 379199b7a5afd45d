"""Tracking by an exported folder's run.py beside the package's own: seconds per frame, logits, masks, sizes of files.

python scripts/benchmarks/exported.py small_base --objects 1 3 16
python scripts/benchmarks/exported.py model_tiny --size 480 854 --frames 4
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from samoe_hf import SamoeConfig, SamoeModel, small_base
from samoe_hf.data import SyntheticVideos
from samoe_hf.data.registry import read_yaml
from samoe_hf.errors import InputError, input_errors
from samoe_hf.export.run import Tracker
from samoe_hf.export.write import export_model
from samoe_hf.inference import VideoPrompt, track_video
from samoe_hf.model.processing_samoe import build_processor


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="small_base, a model's folder, or a config whose model has random weights")
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 3, 16], help="(%(default)s)")
    parser.add_argument("--frames", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 854], help="height and width (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the files (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of both (%(default)s)")
    parsed = parser.parse_args(arguments)
    import onnxruntime

    torch.set_num_threads(parsed.threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = parsed.threads
    torch.manual_seed(0)
    try:
        with input_errors():
            if parsed.model.startswith("model_"):
                model = SamoeModel(SamoeConfig(**read_yaml(parsed.model)))
                # Or random weights see nothing.
                model.mask_decoder.pred_obj_score_head.get_parameter("proj_out.bias").data.fill_(1e3)
            else:
                model = SamoeModel.from_pretrained(small_base() if parsed.model == "small_base" else parsed.model)
    except InputError as error:
        parser.error(str(error))
    model, processor = model.eval(), build_processor(model.config)
    video = SyntheticVideos(1, parsed.frames, tuple(parsed.size), seed=3)[0]
    frames, masks = (
        [np.asarray(frame) for frame in video.frames],
        video.annotations.masks(0, video.annotations.object_ids),
    )
    edges = [(*np.argwhere(mask).min(0)[::-1], *np.argwhere(mask).max(0)[::-1]) for mask in masks if mask.any()]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        export_model(model.to(getattr(torch, parsed.dtype)), processor, folder)
        print(f"Exported in {time.perf_counter() - begin:.0f} s")
        for path in sorted(Path(folder).iterdir()):
            print(f"  {path.name}: {path.stat().st_size / 1e6:.1f} MB")
        tracker = Tracker(folder, sess_options=options)
        model.float()
    print("| objects | PyTorch, s per frame | run.py, s per frame | logits, mean difference | IoU of masks |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for count in parsed.objects:
        boxes = [tuple(float(x) + i // len(edges) for x in edges[i % len(edges)]) for i in range(count)]
        given = [{"frame": 0, "object": i, "box": box} for i, box in enumerate(boxes, 1)]
        prompts = [VideoPrompt(i, box=box) for i, box in enumerate(boxes, 1)]
        begin = time.perf_counter()
        theirs = {x.frame_idx: x.logits.numpy() for x in track_video(model, processor, frames, prompts)}
        middle = time.perf_counter()
        ours = {t: logits for t, _, logits in tracker.track(frames, given)}
        seconds = np.array([middle - begin, time.perf_counter() - middle]) / len(frames)
        a, b = (np.stack([logits[t] for t in sorted(theirs)]) for logits in (theirs, ours))
        iou = ((a > 0) & (b > 0)).sum() / max(((a > 0) | (b > 0)).sum(), 1)
        print(f"| {count} | {seconds[0]:.3f} | {seconds[1]:.3f} | {abs(a - b).mean():.1e} | {iou:.5f} |", flush=True)


if __name__ == "__main__":
    main()
