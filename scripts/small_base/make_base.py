"""Makes the small base that comes with the package of what the last of its runs has trained.

    python scripts/small_base/make_base.py RUN.yaml ... --models outputs/clips ... --output outputs/small_base

Of several models the mean of their weights is taken; each must have gone on from another one. Weights are stored in
bfloat16, and are computed with in float32. The model that is written is scored as it is loaded, from masks and from
three clicks; with `--dataset FOLDER` on videos of yours as well, which it must not have seen.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from torch.optim.swa_utils import AveragedModel

from samoe_hf.data import SYNTHETIC_DOMAINS, SyntheticVideos, load_videos
from samoe_hf.data.registry import read_yaml
from samoe_hf.evaluation.evaluate import evaluate_videos
from samoe_hf.evaluation.metrics import summarize
from samoe_hf.hub.model_card import CardContent, score_entry, write_model_card
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.whole_files import new_folder

NAME = "samoe-small-base"
NUM_VIDEOS, NUM_FRAMES, SEED = 32, 8, 3  # of each look; no run has seen this seed
PROMPTS = {"mask": "the mask of the first frame", "clicks:3": "three clicks on the first frame"}
SETTINGS = ("max_steps", "per_device_train_batch_size", "learning_rate", "point_probability", "num_frames", "seed")
LIMITS = (
    "It has seen nothing but made videos. It is there to try things out: on real videos it often loses the object.",
    "It knows the looks it was trained on; the others in the table of results are there to be learned as domains.",
    "Objects that are small, that leave, or that look like others near them are lost within some ten frames.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the folder, which must be new or empty, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="the YAMLs that it was trained with, in their order")
    parser.add_argument(
        "--models", nargs="+", required=True, metavar="FOLDER", help="what runs have trained; of several, their mean"
    )
    parser.add_argument("--dataset", metavar="FOLDER", help="real videos, to be scored as well")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; it must be new or empty")
    parsed = parser.parse_args(arguments)
    with new_folder(parsed.output) as folder:
        save_rounded(mean_model(parsed.models), folder)
        model = SamoeModel.from_pretrained(folder)
        results = score_looks(model, parsed.dataset)
        write_card(model, folder, results, {path.stem: read_yaml(path) for path in parsed.runs})
    for result in results:
        print(f"{result.dataset_name:44s} {result.metric_name:4s} {result.metric_value:.4f}")


def mean_model(folders: Sequence[str]) -> SamoeModel:
    """The model whose weights are the mean of those of several, each of which has gone on from another one.

    Its frames have the size of the first one's.
    """
    size = SamoeModel.config_class.from_pretrained(folders[0]).image_size
    models = [SamoeModel.from_pretrained(folder, image_size=size) for folder in folders]
    mean = AveragedModel(models[0])
    for model in models:
        mean.update_parameters(model)
    models[0].load_state_dict(mean.module.state_dict())
    return models[0]


def save_rounded(model: SamoeModel, folder: Path) -> None:
    """Saves weights in bfloat16, with a configuration that has them loaded in float32."""
    model.to(torch.bfloat16).save_pretrained(folder, processor=build_processor(model.config))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def score_looks(model: SamoeModel, dataset: str | None) -> list[EvalResult]:
    """J, F and J&F of held-out videos of each look, and of a folder's, if one is given."""
    scores, processor, size = [], build_processor(model.config), (model.config.image_size,) * 2
    sets = {look: SyntheticVideos(NUM_VIDEOS, NUM_FRAMES, size, domain=look, seed=SEED) for look in SYNTHETIC_DOMAINS}
    if dataset is not None:
        sets[Path(dataset).name] = load_videos(dataset)
    for (name, videos), (prompt, said) in product(sets.items(), PROMPTS.items()):
        results = evaluate_videos(model, processor, videos, prompt=prompt)
        summary = summarize({key: result.scores for key, result in results.items()}, protocol="youtube_vos")
        entries = [score_entry(metric, summary[f"{metric}_mean"], name) for metric in ("J", "F", "J&F")]
        about = {"task_name": f"Video object segmentation, from {said}", "dataset_name": f"{name}, from {said}"}
        scores += [replace(entry, **about, dataset_config=prompt) for entry in entries]
    return scores


def write_card(model: SamoeModel, folder: Path, results: list[EvalResult], runs: dict[str, dict[str, Any]]) -> None:
    """Writes `README.md`: how the model was trained, and its scores."""
    training = {f"{run}: {key}": values[key] for run, values in runs.items() for key in SETTINGS if key in values}
    entries = [entry for values in runs.values() for entry in values["train_data"]]
    looks = dict.fromkeys(entry.get("domain", entry["kind"]) for entry in entries)
    content = CardContent(
        eval_results=results,
        training=training,
        domains=[f"synthetic videos: {look}" for look in looks],
        license="apache-2.0",
        limits=LIMITS,
    )
    model.origin.source = None  # it started from random weights
    write_model_card(model, folder, NAME, content)
    card = (folder / "README.md").read_text(encoding="utf-8").replace(f'"{NAME}"', "small_base()")
    (folder / "README.md").write_text(
        card.replace("import SamoeModel\n", "import SamoeModel, small_base\n"), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
