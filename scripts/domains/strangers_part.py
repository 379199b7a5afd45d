"""What videos of no known domain would gain from the experts of other domains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from samoe_hf import SamoeModel, small_base
from samoe_hf.continual.adapt import SMALL_MODEL_EXPERTS, adapt
from samoe_hf.continual.fit_gate import frame_features
from samoe_hf.data import SyntheticVideos
from samoe_hf.evaluation.metrics import score_video, summarize
from samoe_hf.inference import VideoPrompt, load_processor, masks_of, track_video

TRAINING = {
    "num_frames": 4, "point_probability": 0.0, "max_initial_frames": 1, "per_device_train_batch_size": 4,
    "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0, "seed": 0,
    "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def learn(looks: Sequence[str], folder: Path, steps: int, num_videos: int) -> Path:
    """Adds each look to the small model as a domain, unless its folder is there, and returns the last model."""
    source = small_base()
    for look in looks:
        if not (folder / look / "config.json").exists():
            videos = {"kind": "synthetic", "domain": look, "num_videos": num_videos, "num_frames": 4, "seed": 1}
            size = SamoeModel.config_class.from_pretrained(source).image_size
            run = {"train_data": [{**videos, "image_size": [size, size]}], "eval_fraction": 0, "max_steps": steps}
            run |= {"warmup_steps": steps // 10, **TRAINING, **SMALL_MODEL_EXPERTS}
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{look}.yaml").write_text(yaml.safe_dump(run))
            print(adapt(source, look, [str(folder / f"{look}.yaml")], folder / look, like=None).describe())
        source = folder / look
    return Path(source)


def measure_strangers(
    known: Sequence[str], unknown: Sequence[str], folder: Path, steps: int, num_training: int, num_videos: int
) -> list[dict[str, Any]]:
    """J&F of each video by the base, by its own look's experts, and by those of others, as if its look were unknown.

    Where the gate takes a video for another domain's, all columns but `own` are of that domain's experts.
    """
    source = learn(known, folder, steps, num_training)
    model = SamoeModel.from_pretrained(source).eval()
    processor, size, rows = load_processor(source, model), model.config.image_size, []
    for look in [*known, *unknown]:
        others = [i for i, name in enumerate(known) if name != look]
        for video in SyntheticVideos(num_videos, 8, (size, size), domain=look, seed=900):
            prompts = [VideoPrompt(i, mask=m) for i, m in zip(video.object_ids, video.masks(0), strict=True) if m.any()]
            ids = [prompt.object_id for prompt in prompts]
            targets = np.stack([video.masks(t, ids) for t in range(len(video))])

            def logits(domain: str | None) -> np.ndarray:
                outputs = track_video(model, processor, video.frames, prompts, domain=domain)  # noqa: B023
                return np.stack([x.logits[[x.object_ids.index(i) for i in ids]].float().numpy() for x in outputs])  # noqa: B023

            def score(*of: np.ndarray) -> float:
                masks = np.stack([masks_of(one) for one in np.mean(of, axis=0)])
                scores = score_video(masks, targets, ids, None)  # noqa: B023
                return summarize({"video": scores}, protocol="youtube_vos")["J&F_mean"]

            distances = model.domain_gate.decide(frame_features(model, processor, video, [0])).distances[0]
            nearest = sorted(others, key=lambda i: distances[i].item())
            base, ranked = logits(None), [logits(known[i]) for i in nearest[:3]]
            row = {"look": look, "nearest": known[nearest[0]], "taken": distances[nearest[0]].item() <= 1}
            columns = {"base": [base], "experts": ranked[:1], "mean of 2": ranked[:2], "mean of 3": ranked[:3]}
            columns["base and nearest"] = [base, ranked[0]]
            row |= {name: score(*(ranked[:1] if row["taken"] else of)) for name, of in columns.items()}
            rows.append({**row, "own": score(logits(look)) if look in known else None})
    return rows
