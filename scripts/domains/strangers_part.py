"""What videos of no known domain gain from the experts of other domains."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from samoe_hf import SamoeModel, small_base
from samoe_hf.continual.adapt import SMALL_MODEL_EXPERTS, adapt
from samoe_hf.continual.fit_gate import decide_frame
from samoe_hf.data import SyntheticVideos
from samoe_hf.evaluation.metrics import score_video, summarize
from samoe_hf.inference import VideoPrompt, load_processor, masks_of, track_video
from samoe_hf.surgery.domains import remove_domain

TRAINING = {
    "num_frames": 4, "point_probability": 0.0, "max_initial_frames": 1, "per_device_train_batch_size": 4,
    "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0, "seed": 0,
    "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def learn(looks: Sequence[str], folder: Path, steps: int, num_videos: int, seed: int) -> Path:
    """Adds each look to the small model as a domain, unless its folder is there, and returns the last model."""
    source = small_base()
    for look in looks:
        if not (folder / look / "config.json").exists():
            videos = {"kind": "synthetic", "domain": look, "num_videos": num_videos, "num_frames": 4, "seed": 1 + seed}
            size = SamoeModel.config_class.from_pretrained(source).image_size
            run = {"train_data": [{**videos, "image_size": [size, size]}], "eval_fraction": 0, "max_steps": steps}
            run |= {"warmup_steps": steps // 10, **TRAINING, **SMALL_MODEL_EXPERTS, "seed": seed}
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{look}.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
            print(adapt(source, look, [str(folder / f"{look}.yaml")], folder / look, like=None).describe())
        source = folder / look
    return Path(source)


def measure_strangers(
    known: Sequence[str],
    unknown: Sequence[str],
    folder: Path,
    steps: int,
    num_training: int,
    num_videos: int,
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """J&F of each video by each choice of `unknown`, in a model that does not have its look; of each seed of training.

    Beside them that of the mean of the logits of the base and the nearest domain, and by its own look's experts. Where
    the gate takes a video for another domain's, all but the last are of that domain's experts.
    """
    rows = []
    for seed in seeds:
        source = learn(known, folder / f"seed_{seed}", steps, num_training, seed)
        whole = SamoeModel.from_pretrained(source).eval()
        processor, size = load_processor(source, whole), whole.config.image_size
        for look in [*known, *unknown]:
            model = copy.deepcopy(whole)
            if look in known:
                remove_domain(model, look)
            for video in SyntheticVideos(num_videos, 8, (size, size), domain=look, seed=900 + seed):
                ids = video.visible(0)
                prompts = [VideoPrompt(i, mask=mask) for i, mask in zip(ids, video.masks(0, ids), strict=True)]
                targets = np.stack([video.masks(t, ids) for t in range(len(video))])

                def logits(domain: str | None = "auto", unknown: str = "base", of: SamoeModel = model) -> np.ndarray:
                    given = video.frames, prompts  # noqa: B023
                    outputs = track_video(of, processor, *given, domain=domain, unknown=unknown)  # noqa: B023
                    return np.stack([x.logits[[x.object_ids.index(i) for i in ids]].float().numpy() for x in outputs])  # noqa: B023

                def score(*of: np.ndarray) -> float:
                    masks = np.stack([masks_of(one) for one in np.mean(of, axis=0)])
                    scores = score_video(masks, targets, ids, None)  # noqa: B023
                    return summarize({"video": scores}, protocol="youtube_vos")["J&F_mean"]

                decision = decide_frame(model, processor, video, 0)
                base, nearest, half = (logits(unknown=choice) for choice in ("base", "nearest", "mix"))
                name = decision.by("nearest").domain
                row = {"look": look, "seed": seed, "nearest": name, "taken": decision.domain is not None}
                row |= {"base": score(base), "experts": score(nearest), "mix": score(half)}
                row["base and nearest"] = score(base, nearest)
                rows.append({**row, "own": score(logits(look, of=whole)) if look in known else None})
    return rows
