"""What domains of fixed ranks win, and what is left of the highest rank where its experts are cut to fewer bytes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from samoe_hf import SamoeModel, small_base
from samoe_hf.continual.adapt import SMALL_MODEL_EXPERTS, adapt
from samoe_hf.continual.sizes import choose_size, expert_costs, ranks_within
from samoe_hf.continual.start import domain_score
from samoe_hf.data import SyntheticVideos
from samoe_hf.inference import load_processor
from samoe_hf.plots.evaluation import LINES
from samoe_hf.surgery.ranks import set_ranks, sort_directions
from strangers_part import TRAINING

FIXED_RANKS = (4, 8, 16, 32)


def learn_rank(look: str, rank: int, folder: Path, steps: int, num_videos: int) -> Path:
    """The small model with a domain of one expert of some rank, scaled as `set_ranks` does; trained if not there."""
    target = folder / f"{look}_{rank}"
    if not (target / "config.json").exists():
        size = SamoeModel.config_class.from_pretrained(small_base()).image_size
        videos = {"kind": "synthetic", "domain": look, "num_videos": num_videos, "num_frames": 4, "seed": 1}
        of_all = SMALL_MODEL_EXPERTS["num_experts"]
        usual, alpha = of_all * SMALL_MODEL_EXPERTS["lora_rank"], of_all * SMALL_MODEL_EXPERTS["lora_alpha"]
        alpha *= math.sqrt(rank / usual)
        expert = {"num_experts": 1, "num_experts_per_tok": 1, "lora_rank": rank, "lora_alpha": alpha}
        run = {"train_data": [{**videos, "image_size": [size, size]}], "eval_fraction": 0, "max_steps": steps}
        run |= {"warmup_steps": steps // 10, **TRAINING, **SMALL_MODEL_EXPERTS, **expert}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{target.name}.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
        adapt(small_base(), look, [str(folder / f"{target.name}.yaml")], target, like=None)
    return target


def measure_ranks(
    looks: Sequence[str], folder: Path, steps: int, num_training: int, num_videos: int
) -> list[dict[str, Any]]:
    """For each look: J&F of the base, of fixed ranks, of the highest cut to the bytes of each, and of what auto has."""
    rows = []
    for look in looks:
        sources = {rank: learn_rank(look, rank, folder, steps, num_training) for rank in FIXED_RANKS}
        sizes = {rank: SamoeModel.from_pretrained(source) for rank, source in sources.items()}
        model = sizes[max(FIXED_RANKS)]
        processor, size = load_processor(sources[max(FIXED_RANKS)], model), model.config.image_size
        tests, spared = (SyntheticVideos(num_videos, 8, (size, size), domain=look, seed=seed) for seed in (900, 901))
        row = {"look": look, "base": domain_score(model, processor, [*tests], None), "bytes": {}}
        for rank, fixed in sizes.items():
            costs, routers = expert_costs(fixed, look)
            row["bytes"][rank] = rank * sum(costs.values()) + sum(routers.values())
            row[f"rank {rank}"] = domain_score(fixed, processor, [*tests], look)
        for rank in FIXED_RANKS[:-1]:
            cut = SamoeModel.from_pretrained(sources[max(FIXED_RANKS)])
            ranks, _ = ranks_within(row["bytes"][rank], sort_directions(cut, look), *expert_costs(cut, look))
            set_ranks(cut, look, ranks)
            row[f"cut to {rank}"] = domain_score(cut, processor, [*tests], look)
        found = choose_size(model, processor, look, max(row["bytes"].values()), spared, trained_on=False)
        print(found.describe())
        row |= {"chosen": found.chosen, "auto": domain_score(model, processor, [*tests], look)}
        rows.append(row)
    return rows


def draw_ranks(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """J&F over bytes: of fixed ranks, of the highest where it is cut, and of what was chosen."""
    figure = Figure(figsize=(4 * len(rows), 3.6), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        sizes = [row["bytes"][rank] / 1e3 for rank in row["bytes"]]
        fixed = [100 * row[f"rank {rank}"] for rank in FIXED_RANKS]
        cut = [100 * row[f"cut to {rank}"] for rank in FIXED_RANKS[:-1]] + fixed[-1:]
        axes.axhline(100 * row["base"], color="gray", linestyle=":", label="base")
        axes.plot(sizes, fixed, "o-", color=LINES[0], label="fixed ranks 4, 8, 16, 32")
        axes.plot(sizes, cut, "s--", color=LINES[1], label="rank 32, cut after training")
        axes.plot(row["chosen"] / 1e3, 100 * row["auto"], "D", color=LINES[2], markersize=9, label="auto")
        axes.set(title=row["look"], xlabel="kB of the experts", ylabel="J&F", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
