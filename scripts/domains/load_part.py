"""Time to load, RAM and time of tracking of a model with more and more domains, on one core."""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from gate_parts import frames_read
from read_looks import SEED, read_look
from samoe_hf import SamoeModel, small_base
from samoe_hf.continual.adapt import SMALL_MODEL_EXPERTS
from samoe_hf.data import SyntheticVideos
from samoe_hf.inference import VideoPrompt, track_video
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import add_domain, fit_domain

LOOK = "stripes"


@torch.no_grad()
def build_models(counts: Sequence[int], folder: Path) -> None:
    """Writes a model with so many domains for each count. The gate knows the first by stripes, the others by none."""
    model = SamoeModel.from_pretrained(small_base()).eval()
    features, numbers = frames_read(read_look(model, LOOK, range(12), 7, 4))
    generator = torch.Generator().manual_seed(0)
    for index in range(max(counts)):
        name = f"domain_{index}"
        add_domain(model, name, **SMALL_MODEL_EXPERTS)
        for _, experts in domain_modules(model, name):
            experts.lora_B.normal_(std=0.01, generator=generator)
        fit_domain(model, name, features + 10 * index, numbers)
        if index + 1 in counts:
            processor = build_processor(model.config)
            model.save_pretrained(folder / str(index + 1), processor=processor, experts_only=True)


def measure_load(counts: Sequence[int], folder: Path, num_frames: int, repeats: int) -> list[dict[str, Any]]:
    """Builds the models and measures them in a process of its own, where no freed memory is found."""
    build_models(counts, folder)
    words = [sys.executable, __file__, str(folder), str(num_frames), str(repeats), *map(str, counts)]
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)


def measure_models(folder: Path, num_frames: int, repeats: int, counts: Sequence[int]) -> list[dict[str, Any]]:
    """For each count: MB of the files, seconds to load, MB of RAM, and ms a frame of tracking.

    Models take turns at being loaded, and at tracking the same video. Times are of the process, and medians.
    """
    torch.set_num_threads(1)
    warm, models, rams, loads = [SamoeModel.from_pretrained(small_base()) for _ in range(2)], [], [], []
    for turn in range(repeats):
        for source in (folder / str(count) for count in counts):
            gc.collect()
            before, start = psutil.Process().memory_info().rss, time.process_time()
            model = SamoeModel.from_pretrained(source).eval()
            loads.append(time.process_time() - start)
            if turn == 0:
                models.append(model)
                rams.append((psutil.Process().memory_info().rss - before) / 1e6)
    size = warm[0].config.image_size  # models that were loaded before: the first are slower, and find freed memory
    video = SyntheticVideos(1, num_frames, (size, size), domain=LOOK, seed=SEED)[0]
    prompts = [VideoPrompt(i, mask=mask) for i, mask in zip(video.object_ids, video.masks(0), strict=True)]
    processor = build_processor(models[0].config)
    seconds = [[] for _ in models]
    for _ in range(repeats):
        for model, measured in zip(models, seconds, strict=True):
            start = time.process_time()
            domains = {output.domain for output in track_video(model, processor, video.frames, prompts)}
            measured.append((time.process_time() - start) / num_frames)
            assert domains == {"domain_0"}, domains
    return [
        {
            "domains": count,
            "files": sum(path.stat().st_size for path in (folder / str(count)).rglob("*.safetensors")) / 1e6,
            "load": statistics.median(loads[index :: len(counts)]),
            "RAM": ram,
            "tracking": 1000 * statistics.median(measured),
        }
        for index, (count, ram, measured) in enumerate(zip(counts, rams, seconds, strict=True))
    ]


if __name__ == "__main__":
    _, of, *numbers = sys.argv
    frames, times, *of_domains = map(int, numbers)
    print(json.dumps(measure_models(Path(of), frames, times, of_domains)))
