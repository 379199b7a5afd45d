"""What a gate learns of domains, a row of each: fitted, confirmed, appended, renamed and removed.

Each domain is described by itself: a normal distribution of pooled features, and how far from it a video may be. So a
domain is added without the data of others, and no other row changes when one is added, removed or merged. Nothing of
single frames is kept.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from samoe_hf.errors import InputError
from samoe_hf.model.domain_gate import FURTHER, RANK, REFUSING, DomainGate, Normal, hashed_name

# A covariance of n videos is shrunk to its diagonal as if this many videos had shown no correlation, at least by this.
PRIOR_VIDEOS, MIN_SHRINKAGE = 3, 0.1
# Where it is known how videos of other domains vary, a covariance is drawn to that as if so many videos had shown it.
# It was measured at a size in pixels; in larger pictures, means over the picture vary less.
SPREAD_VIDEOS, SPREAD_FILE, SPREAD_SIZE = 2, Path(__file__).with_name("video_spread.safetensors"), 192
# How often factors and what is independent are told apart.
FACTORINGS = 10
# Added to each variance, as a fraction of the mean variance and of the mean square: constant features are no knowledge.
VARIANCE_FLOOR, SQUARE_FLOOR, SMALLEST_VARIANCE = 1e-3, 1e-6, 1e-30
# The part of a domain's own videos that the threshold lets in, and in how many groups they are left out in turn.
QUANTILE, FOLDS = 0.99, 25
# The widest thresholds for the encoder's features, the picture's, and these with further ones, where 1 is the expected
# distance: few videos left out one by one seem too far away. For three videos it is half of these, and beyond so many
# videos more, in proportion.
MAX_THRESHOLDS, ENOUGH_VIDEOS = (16.0, 4.0, 8.0), 32


def video_spread(image_size: int, without: Collection[str] = ()) -> Tensor:
    """How the picture's features and further ones vary among videos of a domain: a covariance (features, features).

    It is the mean of the synthetic looks, each as it is and changed in many ways. A domain of few videos, which show
    little of how further ones vary, is described by this as well. Looks may be left out (`without`), to measure what is
    decided of looks that were never seen.
    """
    spreads = [spread for look, spread in load_file(SPREAD_FILE).items() if look not in without]
    return torch.stack(spreads).double().mean(0) * (SPREAD_SIZE / image_size) ** 0.5


@torch.no_grad()
def fit_row(
    gate: DomainGate, index: int, features: Tensor, videos: Sequence | Tensor, spread: Tensor | None = None
) -> None:
    """Learns one domain, anew if it is known. What is known of the others does not change.

    Of a single video, only frames like its own are recognized later, since it does not show how videos differ.

    Args:
        features: (frames, features) of frames of the domain.
        videos: (frames,) which video each frame is of: numbers or names.
        spread: see [`video_spread`]. Without it further features refuse no video.
    """
    features = gate.checked(features)
    ids = videos.tolist() if isinstance(videos, Tensor) else list(videos)
    if len(ids) != len(features) or not ids:
        raise InputError(
            f"videos must name the video of each of the {len(features)} frames (at least one), not {len(ids)}"
        )
    order = {name: number for number, name in enumerate(sorted(set(ids), key=str))}
    videos = torch.tensor([order[name] for name in ids], device=features.device)
    kinds, further = gate.split(features)
    spread = None if spread is None else spread.to(features)
    gate.counts[index] = len(order)
    _set_row(gate, index, [_fitted(values, videos) for values in kinds])
    if gate.has_further:
        _set_row(gate, index, [_fitted(further, videos)], FURTHER)
        if spread is not None:
            _set_row(gate, index, [_fitted(further, videos, spread)], REFUSING)
            gate.further_refusing_thresholds[index] = _threshold(further, videos, MAX_THRESHOLDS[-1], spread)
    gate.thresholds[index] = torch.stack(
        [_threshold(values, videos, limit) for values, limit in zip(kinds, MAX_THRESHOLDS, strict=False)]
    )


@torch.no_grad()
def confirm_row(gate: DomainGate, index: int, features: Tensor, spread: Tensor | None = None) -> None:
    """Learns of one more video of a domain, without the others: (frames, features). `spread` is that of [`fit_row`].

    Its threshold lets in what is as far away as this video was, up to what so many videos allow.
    """
    count = int(gate.counts[index])
    if count == 0:
        return fit_row(gate, index, features, [0] * len(features), spread)
    kinds, further = gate.split(gate.checked(features))
    normals = gate.normals(index)
    for known, values, threshold, limit in zip(normals, kinds, gate.thresholds[index], MAX_THRESHOLDS, strict=False):
        _widen(threshold, known, values, limit, count)
    _set_row(gate, index, [_with_video(known, values, count) for known, values in zip(normals, kinds, strict=True)])
    if gate.knows_further()[index]:
        _set_row(gate, index, [_with_video(gate.further_normal(FURTHER, index), further, count)], FURTHER)
    if spread is not None and gate.knows_further(REFUSING)[index]:
        known = gate.further_normal(REFUSING, index)
        _widen(gate.further_refusing_thresholds[index], known, further, MAX_THRESHOLDS[-1], count)
        _set_row(gate, index, [_with_video(known, further, count, spread.to(further))], REFUSING)
    gate.counts[index] = count + 1


def _widen(threshold: Tensor, known: Normal, features: Tensor, limit: float, count: int) -> None:
    farthest = known.measure(features)[0].max() * (1 + (count + 1) ** -0.5)
    threshold.copy_(farthest.clamp(max=_limit(limit, count + 1)).float().maximum(threshold))


def _set_row(gate: DomainGate, index: int, normals: Sequence[Normal], prefix: str = "") -> None:
    for name, parts in zip(("means", "noises", "factors"), zip(*normals, strict=True), strict=True):
        gate.get_buffer(prefix + name)[index] = torch.cat(parts, -1)


def distances_between(gate: DomainGate) -> np.ndarray:
    """How far the mean of each domain, a row, is from each: (domains, domains), where a domain's threshold is at 1.

    Further features, which not all domains are known by, do not count. Those of domains that are not known yet are
    infinite.
    """
    without_further = DomainGate(gate.kinds, gate.domains).to(gate.means.device)
    without_further.load_state_dict(gate.state_dict(), strict=False)
    distances = without_further.decide(gate.means).distances
    return distances.masked_fill(gate.counts[:, None] == 0, torch.inf).cpu().numpy()


def append_rows(gate: DomainGate, other: DomainGate) -> None:
    """Appends another gate's domains, which were learned with the same encoder."""
    if other.sizes != gate.sizes:
        raise InputError(f"other gate has {_listed(other.sizes)} features, and this one {_listed(gate.sizes)}")
    gate.domains += other.domains
    for name, buffer in list(gate.named_buffers()):
        setattr(gate, name, torch.cat([buffer, other.get_buffer(name).to(buffer.device)]))


def _listed(sizes: Sequence[int]) -> str:
    return " + ".join(map(str, sizes))


def rename_row(gate: DomainGate, index: int, domain: str) -> None:
    """Gives a domain another name."""
    gate.domains[index] = domain
    gate.names[index] = hashed_name(domain)


def remove_row(gate: DomainGate, index: int) -> None:
    """Forgets a domain; those after it move up by one."""
    del gate.domains[index]
    for name, buffer in list(gate.named_buffers()):
        setattr(gate, name, torch.cat([buffer[:index], buffer[index + 1 :]]))


def _fitted(features: Tensor, videos: Tensor, spread: Tensor | None = None) -> Normal:
    """The distribution of a further video's frames. All videos weigh the same, however many frames they have."""
    _, video, frames = videos.unique(return_inverse=True, return_counts=True)
    count = len(frames)
    weights = (1 / (count * frames.double()))[video, None]
    mean = (weights * features).sum(0)
    centered = features - mean
    return _of_moments(mean, (weights * centered).T @ centered, count, spread)


def _of_moments(mean: Tensor, covariance: Tensor, count: int, spread: Tensor | None) -> Normal:
    """The same by the mean and covariance of `count` videos."""
    scale, added, believed = _prior(count, spread)
    covariance = scale * covariance + added
    variances = covariance.diagonal()
    factors, noise = mean.new_zeros(RANK, len(mean)), torch.zeros_like(variances)
    # What is independent is no part of the factors: else each confirmed video would move more of it there.
    for _ in range(1 if spread is None else FACTORINGS):
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance - noise.diag())
        strongest = eigenvalues[-RANK:].clamp(min=0) * believed
        factors[: len(strongest)] = strongest.sqrt()[:, None] * eigenvectors[:, -RANK:].T
        noise = (variances - factors.square().sum(0)).clamp(min=0)
    floor = VARIANCE_FLOOR * variances.mean() + _least_floor(mean)
    return Normal(mean, noise + floor, factors)


def _least_floor(mean: Tensor) -> Tensor:
    return SQUARE_FLOOR * mean.square().mean() + SMALLEST_VARIANCE


def _with_video(known: Normal, features: Tensor, count: int, spread: Tensor | None = None) -> Normal:
    """The distribution once it has seen one more video than `count`: what [`_fitted`] gives of all of them, but for
    correlations beyond the rank."""
    least, variances = _least_floor(known.mean), known.noise + known.factors.square().sum(0)
    floor = least + VARIANCE_FLOOR * (variances.mean() - least) / (1 + VARIANCE_FLOOR)
    scale, added, believed = _prior(count, spread)
    factors = known.factors / believed**0.5
    covariance = factors.T @ factors
    covariance.diagonal().copy_((variances - floor).maximum(covariance.diagonal()))
    mean = features.mean(0)
    centered, step = features - mean, (mean - known.mean) / (count + 1)
    within = centered.T @ centered / len(features)
    covariance = (count * (covariance - added) / scale + within) / (count + 1) + count * step.outer(step)
    return _of_moments(known.mean + step, covariance, count + 1, spread)


def _threshold(features: Tensor, videos: Tensor, limit: float, spread: Tensor | None = None) -> Tensor:
    """The squared distance per feature within which a further video of a domain is expected.

    The distances of the domain's own videos are measured, each while it is left out. Many show how far away a further
    one may be: the threshold is their quantile, with room for the videos that were not there. The largest of a few
    distances says little: then it is the bound of a further one if their logarithms are normally distributed, and at
    most `limit`. Where nothing can be left out, it is twice the expected distance.
    """
    count = int(videos.max()) + 1
    # Frames of a single video are left out one by one.
    units = videos if count > 1 else torch.arange(len(features), device=features.device)
    num_units = int(units.max()) + 1
    if num_units == 1:
        return features.new_tensor(2.0)
    farthest = features.new_zeros(num_units)
    for fold in range(min(num_units, FOLDS)):
        left_out = units % FOLDS == fold
        squares, _ = _fitted(features[~left_out], videos[~left_out], spread).measure(features[left_out])
        farthest.scatter_reduce_(0, units[left_out], squares, "amax")
    # The largest of n distances is exceeded by the next video's with probability 1 / (n + 1).
    seen = farthest.quantile(QUANTILE, interpolation="higher") * (1 + count**-0.5)
    threshold = torch.maximum(seen, _prediction_bound(farthest.clamp(min=SMALLEST_VARIANCE).log()).exp())
    return threshold.clamp(SQUARE_FLOOR, _limit(limit, count))


def _limit(limit: float, count: int) -> float:
    """The widest threshold of a domain of `count` videos."""
    return limit * count / (count + PRIOR_VIDEOS) * max(1.0, count / ENOUGH_VIDEOS)


def _prior(count: int, spread: Tensor | None) -> tuple[float, Tensor | float, float]:
    """What makes the covariance of `count` videos that of a further one: a factor, what is added, and the part of
    correlations that is believed."""
    # A few videos vary less around their own mean than a further one does.
    widening = (count + 1) / max(count - 1, 0.5)
    if spread is None:
        return widening, 0.0, 1 - max(PRIOR_VIDEOS / (count + PRIOR_VIDEOS), MIN_SHRINKAGE)
    own = count / (count + SPREAD_VIDEOS)
    return widening * own, (1 - own) * (1 + 1 / count) * spread, 1.0


def _prediction_bound(values: Tensor) -> Tensor:
    """What a further value of a normal distribution that is known by n values stays below with probability QUANTILE."""
    count = len(values)
    z = NormalDist().inv_cdf(QUANTILE)
    # Student's t of count - 1 degrees of freedom, by its expansion (Abramowitz and Stegun, 26.7.5).
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96)
    t = sum(term / (count - 1) ** power for power, term in enumerate(terms))
    return values.mean() + t * (1 + 1 / count) ** 0.5 * values.std()
