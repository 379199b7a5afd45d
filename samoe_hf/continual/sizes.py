"""How large a domain's experts need to be: after training at a high rank, the directions that do least are left out.

Each direction is a singular one of an expert's product B A. Of all layers together, those with the largest squared
singular value for their bytes stay, so layers differ in rank, and some have no experts any more. The fewer stay, the
smaller the file; how few may is told by tracking videos. All that is compared has the same training behind it, so that
differences are those of size alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError
from samoe_hf.evaluation.report import format_number, format_table
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.surgery.ranks import set_ranks, sort_directions

from .start import read_excerpts, video_scores

# The rank that is trained, of all experts of a layer together, and of each at least.
TRAINED_RANK, LEAST_RANK = 32, 4
# How much J&F, from 0 to 1, may be lost for fewer bytes: the mean over videos and its standard error.
TOLERANCE = 0.01
# Neighbouring sizes that were tried at last differ by at most this factor.
PRECISION = 1.25


@dataclass(frozen=True)
class TriedSize:
    """Experts of some size.

    Attributes:
        bytes: of their tensors.
        ranks: the least and the highest of a layer's, and the mean over all layers.
        layers: how many have experts.
        score: J&F from 0 to 1, the mean over videos.
        loss, error: how much less that is than of all that was trained: the mean over videos, and its standard error,
            0 for one video. NaN where no video can be scored.
    """

    bytes: int
    ranks: tuple[int, int, float]
    layers: int
    score: float
    loss: float
    error: float


@dataclass
class Sizes:
    """Sizes that were tried, the largest first, the one that was chosen, and the reason, a sentence.

    `budget` and `chosen` are bytes; `videos` says how many were tracked, and whether they were trained on.
    """

    budget: int
    videos: int
    trained_on: bool
    tried: list[TriedSize] = field(default_factory=list)
    chosen: int = 0
    reason: str = ""

    def table(self) -> str:
        """What was tried, as text."""
        rows = [
            [
                "*" if one.bytes == self.chosen else "",
                format_bytes(one.bytes),
                f"{one.ranks[0]} to {one.ranks[1]}, mean {one.ranks[2]:.1f}",
                one.layers,
                format_number(100 * one.score, 1),
                f"{format_number(100 * one.loss, 1, '+')} ± {format_number(100 * one.error, 1)}",
            ]
            for one in self.tried
        ]
        return format_table(["", "size", "ranks", "layers", "J&F", "lost"], rows, left=())

    def describe(self) -> str:
        """What was tried and chosen, in sentences."""
        whose = "that were trained on, since there are few" if self.trained_on else "that were spared from training"
        videos = f"{self.videos} video{'s' * (self.videos != 1)}"
        return (
            f"{self.table()}\nSizes of the experts, tried on {videos} {whose}. Chosen: {format_bytes(self.chosen)}. "
            f"{self.reason}"
        )


def format_bytes(count: float) -> str:
    """Bytes as text, in kB or MB."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def raise_ranks(model: SamoeModel, domain: str, budget: int) -> None:
    """Gives a domain's experts the rank that is trained before some of it is left out; they do what they did."""
    costs, fixed = expert_costs(model, domain)
    if not costs:
        raise InputError(f"`lora_rank` auto chooses ranks of experts, but the domain {domain!r} has none.")
    if (least := min(costs[layer] + fixed[layer] for layer in costs)) > budget:
        raise InputError(
            f"A budget of {format_bytes(budget)} is too little: experts of rank 1 in a single one of the {len(costs)} "
            f"layers that `expert_modules` selects have {format_bytes(least)} or more."
        )
    modules = [experts for _, experts in domain_modules(model, domain)]
    rank = max(LEAST_RANK, TRAINED_RANK // modules[0].num_experts, *(experts.lora_rank for experts in modules))
    set_ranks(model, domain, rank)


@torch.no_grad()
def choose_size(
    model: SamoeModel, processor: VideoProcessor, domain: str, budget: int, videos: Sequence[Video], trained_on: bool
) -> Sizes:
    """Leaves out of a domain's experts what does not matter on some videos, and what is over the budget in bytes.

    Sizes are halved until the videos are tracked clearly worse, and then searched between the last two. `trained_on`
    says of the videos whether they were, for the report.
    """
    excerpts = read_excerpts(model, videos)
    energies = sort_directions(model, domain)
    costs, fixed = expert_costs(model, domain)
    modules = dict(domain_modules(model, domain))
    trained = {layer: experts.lora_B.clone() for layer, experts in modules.items()}

    def try_size(limit: float) -> tuple[TriedSize, dict[str, int], list[float]]:
        ranks, size = ranks_within(limit, energies, costs, fixed)
        for layer, rank in ranks.items():
            modules[layer].lora_B.copy_(trained[layer])[..., rank:] = 0
        scores = broadcast_object_list([video_scores(model, processor, excerpts, domain)])[0]
        lost = np.array(all_scores or scores) - np.array(scores)
        scored = ~np.isnan(lost)
        score, loss, error = math.nan, math.nan, 0.0
        if scored.any():
            score, loss = float(np.array(scores)[scored].mean()), float(lost[scored].mean())
        if scored.sum() > 1:
            error = float(lost[scored].std(ddof=1) / math.sqrt(scored.sum()))
        of = list(ranks.values())
        about = min(of), max(of), sum(of) / len(of)
        return TriedSize(size, about, sum(rank > 0 for rank in of), score, loss, error), ranks, scores

    all_scores: list[float] = []
    largest, ranks, all_scores = try_size(math.inf)
    result = Sizes(budget, len(excerpts), trained_on, [largest])
    good, bad, best = min(budget, largest.bytes), None, None if largest.bytes > budget else ranks
    least = min(costs[layer] + fixed[layer] for layer in costs)
    limit = good if best is None else max(good / 2, least)
    while best is None or (limit < good and (bad is None or good / bad > PRECISION)):
        if ranks_within(limit, energies, costs, fixed)[1] in {one.bytes for one in result.tried}:
            bad = limit  # the same directions once more
        else:
            one, ranks, _ = try_size(limit)
            result.tried.append(one)
            if best is None or one.loss + one.error <= TOLERANCE:
                good = result.chosen = one.bytes
                best = ranks
            else:
                bad = limit
        limit = max(good / 2, least) if bad is None else math.sqrt(good * bad)
    assert best is not None
    for layer, values in trained.items():
        modules[layer].lora_B.copy_(values)
    set_ranks(model, domain, best)
    result.chosen = result.chosen or largest.bytes
    result.tried.sort(key=lambda one: -one.bytes)
    result.reason = _reason(result)
    return result


def _reason(sizes: Sizes) -> str:
    """Why the size that was chosen was."""
    one = next(one for one in sizes.tried if one.bytes == sizes.chosen)
    point = f"{100 * TOLERANCE:.0f} point of J&F"
    if math.isnan(one.loss):
        return "No video could be scored, so nothing says that fewer would do."
    if one.loss + one.error > TOLERANCE:
        return f"The budget of {format_bytes(sizes.budget)} allows no more, which costs more than {point}."
    if sizes.tried[-1].bytes < sizes.chosen:
        return f"The next smaller one may lose more than {point}."
    return "There is nothing smaller."


def expert_costs(model: SamoeModel, domain: str) -> tuple[dict[str, int], dict[str, int]]:
    """By layer: bytes of one rank of its experts, and of their router."""
    costs, fixed = {}, {}
    for layer, experts in domain_modules(model, domain):
        of_value = experts.lora_A.element_size()
        costs[layer] = of_value * experts.num_experts * (experts.in_features + experts.out_features)
        fixed[layer] = of_value * sum(parameter.numel() for parameter in experts.router.parameters())
    return costs, fixed


def ranks_within(
    limit: float, energies: Mapping[str, Tensor], costs: Mapping[str, int], fixed: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    """The rank of each layer, and the bytes: directions of most energy for a byte, as many as the limit allows."""
    found = sorted(((v / costs[layer], layer) for layer, of in energies.items() for v in of.tolist()), reverse=True)
    ranks, size = dict.fromkeys(energies, 0), 0
    for _, layer in found:
        more = costs[layer] + (0 if ranks[layer] else fixed[layer])
        if size + more <= limit:
            ranks[layer], size = ranks[layer] + 1, size + more
    return ranks, size
