"""What the gate decides of videos of domains that it knows by few videos, or beside many others."""

import copy
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from read_looks import SEED, VARIANTS, read_look
from samoe_hf import SamoeModel, load_videos
from samoe_hf.continual.adapt import Adaptation
from samoe_hf.continual.fit_gate import FRAMES_IN_ALL, MAX_FRAMES, MIN_FRAMES, gate_features, leave_out
from samoe_hf.data.schema import evenly_chosen
from samoe_hf.model.domain_gate import NO_DOMAIN, DomainGate, num_pooled_features
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import add_domain
from samoe_hf.surgery.gate import SPREAD_SIZE, confirm_row, fit_row, video_spread

LEAST_LIKELIHOODS = (0.5, 0.8, 0.95)
Looks = dict[str, tuple[list[Tensor], Tensor]]
Variants = Mapping[tuple[str, str], Sequence[Tensor]]


def read_looks(model: SamoeModel, looks: Sequence[str], num_known: int, num_held_out: int) -> Looks:
    """Of each look: videos that a gate may know, (frames, features), and first frames of others, (videos, features)."""
    read = {}
    for look in tqdm(looks, desc="what the gate reads", unit="look"):
        held_out = read_look(model, look, range(num_known, num_known + num_held_out), MAX_FRAMES, 1)
        read[look] = read_look(model, look, range(num_known), MAX_FRAMES, MAX_FRAMES), torch.cat(held_out)
    return read


def frames_read(videos: Sequence[Tensor], most: int = MAX_FRAMES) -> tuple[Tensor, Tensor]:
    """Features and numbers of so many videos, with as many frames of each as `samoe adapt` reads, or `most`."""
    count = min(most, MAX_FRAMES, max(MIN_FRAMES, FRAMES_IN_ALL // len(videos)))
    chosen = [video[evenly_chosen(range(len(video)), count)] for video in videos]
    return torch.cat(chosen), torch.arange(len(videos)).repeat_interleave(torch.tensor([len(one) for one in chosen]))


def gate_of(kinds: Any, *domains: tuple[Tensor, Tensor], without: Sequence[str] = ()) -> DomainGate:
    """A gate that knows domains by their features and numbers, and not how videos of the looks `without` vary."""
    gate = DomainGate(kinds, [str(i) for i in range(len(domains))])
    for index, (features, numbers) in enumerate(domains):
        fit_row(gate, index, features, numbers, video_spread(SPREAD_SIZE, without))
    return gate


def share(gate: DomainGate, features: Tensor, domain: int = 0) -> float:
    """The share of first frames that the gate gives to a domain."""
    return (gate.decide(features).domain == domain).float().mean().item()


def let_in(gate: DomainGate, looks: Looks, own: str) -> dict[str, float]:
    """The share that the gate lets in of each other look."""
    return {look: share(gate, held_out) for look, (_, held_out) in looks.items() if look != own}


def mean(shares: dict[str, float]) -> float:
    return statistics.mean(shares.values())


def choose(videos: Sequence[Tensor], count: int, choice: int) -> list[Tensor]:
    order = torch.randperm(len(videos), generator=torch.Generator().manual_seed(100 * count + choice))
    return [videos[i] for i in order[:count]]


def read_dataset(model: SamoeModel, folder: str) -> list[Tensor]:
    """Videos of a folder: (frames, features) each."""
    processor, videos = build_processor(model.config), load_videos(folder)
    return [gate_features(model, processor, folder, [video], show_progress_bar=False)[0] for video in videos]


def measure_known(
    model: SamoeModel, looks: Looks, num_choices: int, datasets: Mapping[str, list[Tensor]]
) -> list[dict[str, Any]]:
    """Each look beside all others, known by half of its videos, and datasets by three quarters of theirs: right, in a
    wrong domain; and to the base if it was never seen, by all that the gate reads and by the encoder alone."""
    kinds, rows = num_pooled_features(model.config), []
    for choice in range(num_choices):
        known = {name: frames_read(choose(videos, len(videos) // 2, choice)) for name, (videos, _) in looks.items()}
        all_held_out = {name: held_out for name, (_, held_out) in looks.items()}
        for name, videos in datasets.items():
            order, count = choose(videos, len(videos), choice), 3 * len(videos) // 4
            known[name], all_held_out[name] = frames_read(order[:count]), torch.cat(order[count:])
        gate = gate_of(kinds, *known.values())
        for index, (look, held_out) in enumerate(all_held_out.items()):
            others = [one for name, one in known.items() if name != look]
            right, refused = (share(gate, held_out, domain) for domain in (index, NO_DOMAIN))
            unseen = share(gate_of(kinds, *others), held_out, NO_DOMAIN)
            encoder = gate_of(kinds[:1], *((features[:, : kinds[0]], numbers) for features, numbers in others))
            alone = share(encoder, held_out[:, : kinds[0]], NO_DOMAIN)
            rows.append({"look": look, "right": right, "wrong": 1 - right - refused, "unseen": unseen, "alone": alone})
    return rows


def measure_changed(model: SamoeModel, looks: Looks, num_videos: int) -> list[dict[str, Any]]:
    """Videos of known looks that are changed: the base, the look's experts, or another's."""
    gate = gate_of(num_pooled_features(model.config), *(frames_read(videos) for videos, _ in looks.values()))
    rows = []
    for look, change in VARIANTS:
        if look in looks and change != "plain":
            start = len(looks[look][0])
            first = torch.cat(read_look(model, look, range(start, start + num_videos), 7, 1, change))
            base, own = (share(gate, first, domain) for domain in (NO_DOMAIN, list(looks).index(look)))
            rows.append({"change": change, "look": look, "base": base, "own": own, "another": 1 - base - own})
    return rows


def measure_few(model: SamoeModel, looks: Looks, counts: Sequence[int], num_choices: int) -> list[dict[str, Any]]:
    """One domain alone, known by so many videos: own refused, what `samoe adapt` says, and other looks let in; and the
    same with 4 frames of each video. Of how videos vary, the gate knows nothing by the look and the other one."""
    model, kinds, rows = copy.deepcopy(model), num_pooled_features(model.config), []
    add_domain(model, "0", num_experts=0)
    for count in counts:
        for look, (videos, held_out) in looks.items():
            for choice in range(num_choices if count < len(videos) else 1):
                chosen = choose(videos, count, choice)
                known, row = frames_read(chosen), {"known": count, "look": look}
                row["said"] = Adaptation("0", count, {}, left_out=leave_out(model, "0", *known)).refused
                for prefix, one in (("", known), ("4 frames: ", frames_read(chosen, MIN_FRAMES))):
                    refused, each = [], {}
                    for other, (_, others) in looks.items():
                        if other != look:
                            gate = gate_of(kinds, one, without=(look, other))
                            refused.append(1 - share(gate, held_out))
                            each[other] = share(gate, others)
                    row |= {f"{prefix}refused": statistics.mean(refused), f"{prefix}each let in": each}
                    row[f"{prefix}let in"] = mean(each)
                rows.append(row)
    return rows


def measure_confirm(model: SamoeModel, looks: Looks, counts: Sequence[int], num_choices: int) -> list[dict[str, Any]]:
    """A gate that learns three videos and confirms the rest, one that confirms what it refuses, and one that learns all
    at once: own videos that are recognized, and other looks let in."""
    kinds, rows, spread = num_pooled_features(model.config), [], video_spread(SPREAD_SIZE)
    for look, (videos, held_out) in looks.items():
        for choice in range(num_choices):
            order = choose(videos, len(videos), choice)
            confirmed, refused = (gate_of(kinds, frames_read(order[:3])) for _ in range(2))
            for count in range(3, max(counts) + 1):
                if count > 3:
                    video = order[count - 1]
                    confirm_row(confirmed, 0, video, spread)
                    if share(refused, video[:1]) == 0:
                        confirm_row(refused, 0, video, spread)
                if count in counts:
                    row = {"known": count, "look": look, "told": int(refused.counts[0]) - 3}
                    gates = {"at once": gate_of(kinds, frames_read(order[:count])), "confirmed": confirmed}
                    for name, gate in {**gates, "refused ones": refused}.items():
                        row |= {name: share(gate, held_out), f"{name}, let in": mean(let_in(gate, looks, look))}
                    rows.append(row)
    return rows


def measure_many(
    model: SamoeModel,
    counts: Sequence[int],
    num_known: int,
    num_held_out: int,
    num_choices: int,
    others: tuple[int, int],
) -> list[dict[str, Any]]:
    """Variants of the looks, so many of them known: shares of their further videos that are right, get the base or
    another domain, also if a domain is taken only where it is at least so likely; the share of videos of all others
    that get the base; and the pairs that are confused most often. Last, the same of those that [`tell_apart`] leaves,
    by as many other videos of each as `others` says."""
    kinds, names, rng = num_pooled_features(model.config), VARIANTS[: max(counts) + 2], random.Random(0)
    features, more = {}, {}
    for name in tqdm(names, desc="what the gate reads", unit="look"):
        (look, change), count = name, num_known + num_held_out
        features[name] = read_look(model, look, range(count), 7, MIN_FRAMES, change)
        more[name] = read_look(model, look, range(sum(others)), 7, MIN_FRAMES, change, seed=SEED + 2)
    different = tell_apart(kinds, more, others[0])
    numbers = {count: num_choices if count < 100 else max(1, num_choices // 2) for count in counts}
    chosen = {count: [rng.sample(names, len(names)) for _ in range(number)] for count, number in numbers.items()}
    rows = [_tell(kinds, features, chosen[count], count, num_known) for count in counts]
    alike = [name for name in names if name not in different]
    last = _tell(kinds, features, [different + alike], len(different), num_known)
    return [*rows, {**last, "domains": f"{len(different)} that differ", "left out": [" ".join(name) for name in alike]}]


def tell_apart(kinds: Any, features: Variants, num_known: int) -> list[tuple[str, str]]:
    """Variants without those that look alike: the one in most mistakes of a gate that knows so many videos of each is
    left out, until the gate takes none of their further videos for one of another."""
    names, known = list(features), [frames_read(videos[:num_known], MIN_FRAMES) for videos in features.values()]
    first = torch.stack([video[0] for videos in features.values() for video in videos[num_known:]])
    own, left = torch.arange(len(names)).repeat_interleave(len(first) // len(names)), torch.ones(len(names)).bool()
    decided = gate_of(kinds, *known).decide(first)  # of each domain by itself, whatever others the gate knows
    while True:
        likeliest = decided.likelihoods.masked_fill(~left, -1).argmax(1)
        inside = decided.distances.gather(1, likeliest[:, None])[:, 0] <= 1
        mistakes = left[own] & inside & (likeliest != own)
        if not mistakes.any():
            return [name for name, stays in zip(names, left, strict=True) if stays]
        counts = torch.bincount(torch.cat([own[mistakes], likeliest[mistakes]]), minlength=len(names))
        left[counts.argmax()] = False


def _tell(
    kinds: Any, features: Variants, choices: Sequence[list[tuple[str, str]]], count: int, num_known: int
) -> dict[str, Any]:
    """What gates decide that know so many domains, the first of each choice of names."""
    totals, surer, pairs, seconds = Counter(), Counter(), Counter(), []
    for names in choices:
        gate = gate_of(kinds, *(frames_read(features[name][:num_known], MIN_FRAMES) for name in names[:count]))
        for index, name in enumerate(names):
            held_out = torch.stack([video[0] for video in features[name][num_known:]])
            decided = gate.decide(held_out)
            for domain, likelihood in zip(decided.domain.tolist(), decided.likelihoods.amax(1), strict=True):
                kind = "base" if domain == NO_DOMAIN else "right" if domain == index else "wrong"
                for least in LEAST_LIKELIHOODS if index < count else ():
                    surer[f"{kind if likelihood >= least else 'base'} from {least:.0%} on"] += 1
                totals[kind if index < count else f"unknown, {kind}"] += 1
                if index < count and kind == "wrong":
                    pairs[f"{' '.join(name)}, {' '.join(names[domain])}"] += 1
        for _ in range(20):
            start = time.perf_counter()
            gate.decide(features[names[0]][0][:1])
            seconds.append(time.perf_counter() - start)
    unknown = sum(number for kind, number in totals.items() if kind.startswith("unknown"))
    shares = {kind: totals[kind] / (totals.total() - unknown) for kind in ("right", "base", "wrong")}
    shares["unknown to base"] = totals["unknown, base"] / unknown if unknown else math.nan
    surer = {name: number * len(LEAST_LIKELIHOODS) / surer.total() for name, number in sorted(surer.items())}
    milliseconds = 1000 * statistics.median(seconds)
    return {"domains": count, **shares, **surer, "ms": milliseconds, "confused": pairs.most_common(12)}
