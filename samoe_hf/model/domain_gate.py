"""The gate that recognizes a video's domain, from a frozen encoder's features of one frame and from its picture.

Each domain is described by itself: a normal distribution of pooled features, and how far from it a video may be. So a
domain is added without the data of others, and no other domain's description changes when one is added, removed or
merged. Nothing of single frames is kept.
"""

import hashlib
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base_modules import ImageFeatures
from .errors import InputError

# The index of a video that looks like no known domain.
NO_DOMAIN = -1
# Directions in which a domain's features vary together; beyond them, features count as independent.
RANK = 16
# A covariance of n videos is shrunk to its diagonal as if this many videos had shown no correlation, at least by this.
PRIOR_VIDEOS, MIN_SHRINKAGE = 3, 0.1
# Added to each variance, as a fraction of the mean variance and of the mean square: constant features are no knowledge.
VARIANCE_FLOOR, SQUARE_FLOOR, SMALLEST_VARIANCE = 1e-3, 1e-6, 1e-30
# The part of a domain's own videos that the threshold lets in, and in how many groups they are left out in turn.
QUANTILE, FOLDS = 0.99, 25
# The widest thresholds for the encoder's features and for the picture's, where 1 is the expected distance: few videos
# left out one by one seem too far away. Beyond so many videos they may be wider in proportion.
MAX_THRESHOLDS, ENOUGH_VIDEOS = (4.0, 2.0), 32
# Features vary together in more ways than a domain's description has: the logarithms of likelihoods differ by so many
# times more than they should. Measured on a hundred domains, see docs/domains.md.
OVERCONFIDENCE = 6.0
# What the gate sees of a picture: mixtures of its normalized red, green and blue (lightness, red against green, yellow
# against blue), at so many scales. Contrast below the smallest is rounding or compression.
COLOURS = ((1 / 3, 1 / 3, 1 / 3), (1.0, -1.0, 0.0), (0.5, 0.5, -1.0))
SCALES, SMALLEST_CONTRAST = 5, 0.02


class GateDecision(NamedTuple):
    """What [`DomainGate.decide`] finds for each row.

    `domain` (rows,): index of the domain, or `NO_DOMAIN`. `confidence` (rows,): 1 is certain, 0.5 is on the threshold,
    and less is for a domain that another one rivals. `distances` (rows, domains): a domain's threshold is at 1.
    `likelihoods` (rows, domains): how likely each is, if the row is of one of them; they sum to 1.
    """

    domain: Tensor
    confidence: Tensor
    distances: Tensor
    likelihoods: Tensor


def pooled_features(image: ImageFeatures, pixel_values: Tensor) -> Tensor:
    """What the gate sees of frames: (rows, hidden / 4 + 15) float32.

    First mean and standard deviation of each channel of the finest features, which show texture and noise as the
    encoder knows them. Then the logarithm of the picture's contrast in each colour at each scale: what an encoder that
    saw one domain alone ignores of others still tells kinds of pictures apart.

    Args:
        image: of the plain encoder.
        pixel_values: (rows, 3, S, S), the frames as the encoder gets them.
    """
    fine = image.fine.float()
    encoded = [fine.mean((2, 3)), fine.std((2, 3), correction=0)]
    return torch.cat([*encoded, *_contrasts(pixel_values.to(fine.device))], dim=1)


def _contrasts(pixel_values: Tensor) -> list[Tensor]:
    """For each scale from fine to coarse, the logarithm of the contrast in each colour that the next scale loses."""
    colours = pixel_values.new_tensor(COLOURS, dtype=torch.float32)[..., None, None]
    picture = (colours * pixel_values.float()[:, None]).sum(2)  # no matrix product, which autocast would round
    contrasts = []
    for _ in range(SCALES):
        coarser = F.avg_pool2d(picture, 2, ceil_mode=True)
        lost = picture - F.interpolate(coarser, scale_factor=2)[..., : picture.shape[2], : picture.shape[3]]
        contrasts.append((lost.square().mean((2, 3)).sqrt() + SMALLEST_CONTRAST).log())
        picture = coarser
    return contrasts


def num_pooled_features(config: Any) -> tuple[int, int]:
    """How many features [`pooled_features`] gives for a model of this configuration: the encoder's, the picture's."""
    return config.mask_decoder_config.hidden_size // 4, SCALES * len(COLOURS)


class _Normal(NamedTuple):
    """A normal distribution of covariance diag(`noise`) + `factors`^T `factors`, for one domain or a batch of them.

    `mean` and `noise` (..., features), `factors` (..., RANK, features).
    """

    mean: Tensor
    noise: Tensor
    factors: Tensor

    @classmethod
    def fit(cls, features: Tensor, videos: Tensor) -> "_Normal":
        """The distribution of a further video's frames. All videos weigh the same, however many frames they have."""
        _, video, frames = videos.unique(return_inverse=True, return_counts=True)
        count = len(frames)
        weights = (1 / (count * frames.double()))[video, None]
        mean = (weights * features).sum(0)
        centered = features - mean
        return cls._of_moments(mean, (weights * centered).T @ centered, count)

    @classmethod
    def _of_moments(cls, mean: Tensor, covariance: Tensor, count: int) -> "_Normal":
        """The same by the mean and covariance of `count` videos."""
        # A few videos vary less around their own mean than a further one does.
        covariance = covariance * _widening(count)
        variances = covariance.diagonal()
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        strongest = eigenvalues[-RANK:].clamp(min=0) * (1 - _shrinkage(count))
        factors = mean.new_zeros(RANK, len(mean))
        factors[: len(strongest)] = strongest.sqrt()[:, None] * eigenvectors[:, -RANK:].T
        floor = VARIANCE_FLOOR * variances.mean() + cls._least_floor(mean)
        return cls(mean, variances - factors.square().sum(0) + floor, factors)

    @staticmethod
    def _least_floor(mean: Tensor) -> Tensor:
        return SQUARE_FLOOR * mean.square().mean() + SMALLEST_VARIANCE

    def with_video(self, features: Tensor, count: int) -> "_Normal":
        """The distribution, of `count` videos, once it has seen one more: (frames, features).

        It is what `fit` gives of all of them, but for correlations beyond the rank.
        """
        least, variances = self._least_floor(self.mean), self.noise + self.factors.square().sum(0)
        floor = least + VARIANCE_FLOOR * (variances.mean() - least) / (1 + VARIANCE_FLOOR)
        factors = self.factors / (1 - _shrinkage(count)) ** 0.5
        covariance = factors.T @ factors
        covariance.diagonal().copy_((variances - floor).maximum(covariance.diagonal()))
        mean = features.mean(0)
        centered, step = features - mean, (mean - self.mean) / (count + 1)
        within = centered.T @ centered / len(features)
        covariance = (count * covariance / _widening(count) + within) / (count + 1) + count * step.outer(step)
        return self._of_moments(self.mean + step, covariance, count + 1)

    def measure(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Squared Mahalanobis distances of rows per feature, and log densities up to a constant, each (..., rows)."""
        centered = features - self.mean[..., None, :]
        scaled = self.factors / self.noise[..., None, :]
        inner = scaled @ self.factors.mT + torch.eye(RANK, dtype=features.dtype, device=features.device)
        cholesky = torch.linalg.cholesky(inner)
        explained = torch.linalg.solve_triangular(cholesky, scaled @ centered.mT, upper=False).square().sum(-2)
        squares = (centered.square() / self.noise[..., None, :]).sum(-1) - explained
        squares = squares.clamp(min=0)
        log_determinant = self.noise.log().sum(-1) + 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return squares / features.shape[1], -(squares + log_determinant[..., None]) / 2


class DomainGate(nn.Module):
    """Recognizes domains by pooled features of a frozen encoder. All it knows are buffers, kept in float32. Its rows
    are those of domains by name: loading a state dict, whatever its order, brings each row to its domain.

    A row is given to the domain under which it is most likely, if it is not farther from it than the domain's own
    videos are when they are left out of its description; otherwise to none. Features may be of several kinds, which
    count as independent: a row must be near enough in each of them.

    The buffers are `names` (domains,), a hash of each domain's name; `counts` (domains,), the number of videos, 0 for
    a domain that is not known yet and is never chosen; `means` and `noises` (domains, features), and `factors`
    (domains, RANK, features), see [`_Normal`]; `thresholds` (domains, kinds), squared Mahalanobis distances.

    Args:
        num_features: length of the pooled features, or how many there are of each kind, one kind after the other.
        domains: names of domains that are not known yet, to be loaded or fitted.
    """

    names: Tensor
    counts: Tensor
    means: Tensor
    noises: Tensor
    factors: Tensor
    thresholds: Tensor

    def __init__(self, num_features: int | Sequence[int], domains: Sequence[str] = ()):
        super().__init__()
        self.kinds = (num_features,) if isinstance(num_features, int) else tuple(num_features)
        if min(self.kinds, default=0) < 1:
            raise InputError(f"num_features must be at least 1, not {num_features}")
        if len(self.kinds) > len(MAX_THRESHOLDS):
            raise InputError(f"num_features must be of at most {len(MAX_THRESHOLDS)} kinds, not {len(self.kinds)}")
        self.num_features = sum(self.kinds)
        self.domains, num_domains = list(domains), len(domains)
        shape = (num_domains, self.num_features)
        self.register_buffer("names", torch.empty(num_domains, dtype=torch.long))
        self.register_buffer("counts", torch.empty(num_domains, dtype=torch.long))
        self.register_buffer("means", torch.empty(shape, dtype=torch.float32))
        self.register_buffer("noises", torch.empty(shape, dtype=torch.float32))
        self.register_buffer("factors", torch.empty(num_domains, RANK, self.num_features, dtype=torch.float32))
        self.register_buffer("thresholds", torch.empty(num_domains, len(self.kinds), dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets what is known, but not how many domains there are."""
        for name, buffer in self.named_buffers():
            if name == "names":
                buffer.copy_(torch.tensor(self._expected_names(), dtype=torch.long))
            else:
                nn.init.constant_(buffer, 1 if name == "noises" else 0)

    def __len__(self) -> int:
        return len(self.counts)

    @torch.no_grad()
    def decide(self, features: Tensor) -> GateDecision:
        """Which domain each row of (rows, features) belongs to.

        Raises:
            ValueError: another number of features, or values that are not finite.
        """
        features = self._check(features)
        rows, known = len(features), self.counts > 0
        if not known.any():
            domain = torch.full((rows,), NO_DOMAIN, device=features.device)
            distances = features.new_full((rows, len(self)), torch.inf)
            return GateDecision(domain, features.new_ones(rows), distances, torch.zeros_like(distances))
        parts = [x.double().split(self.kinds, -1) for x in (self.means, self.noises, self.factors)]
        kinds = zip(zip(*parts, strict=True), features.split(self.kinds, 1), strict=True)
        squares, log_densities = zip(*(_Normal(*normal).measure(values) for normal, values in kinds), strict=True)
        ratios = (torch.stack(squares, -1) / self.thresholds.double()[:, None]).amax(-1)  # (domains, rows)
        ratios = ratios.T.masked_fill(~known, torch.inf)
        log_density = torch.stack(log_densities).sum(0).T.masked_fill(~known, -torch.inf)
        domain, likelihoods = log_density.argmax(dim=1), (log_density / OVERCONFIDENCE).softmax(dim=1)
        probability = likelihoods.gather(1, domain[:, None])[:, 0]
        ratio = ratios.gather(1, domain[:, None])[:, 0]
        inside = ratio <= 1
        confidence = torch.where(inside, torch.minimum(probability, 1 / (1 + ratio)), ratio / (1 + ratio))
        return GateDecision(domain.where(inside, NO_DOMAIN), confidence, ratios.sqrt(), likelihoods)

    @torch.no_grad()
    def fit(self, index: int, features: Tensor, videos: Sequence | Tensor) -> None:
        """Learns one domain, anew if it is known. What is known of the others does not change.

        Of a single video, only frames like its own are recognized later, since it does not show how videos differ.

        Args:
            features: (frames, features) of frames of the domain.
            videos: (frames,) which video each frame is of: numbers or names.

        Raises:
            ValueError: no frames, another number of features or of videos, or values that are not finite.
        """
        self._check_index(index)
        features = self._check(features)
        ids = videos.tolist() if isinstance(videos, Tensor) else list(videos)
        if len(ids) != len(features) or not ids:
            raise InputError(
                f"videos must name the video of each of the {len(features)} frames (at least one), not {len(ids)}"
            )
        order = {name: number for number, name in enumerate(sorted(set(ids), key=str))}
        videos = torch.tensor([order[name] for name in ids], device=features.device)
        kinds = features.split(self.kinds, 1)
        normals = zip(*(_Normal.fit(values, videos) for values in kinds), strict=True)
        self.counts[index] = len(order)
        self.means[index], self.noises[index], self.factors[index] = (torch.cat(parts, -1) for parts in normals)
        self.thresholds[index] = torch.stack(
            [_threshold(values, videos, limit) for values, limit in zip(kinds, MAX_THRESHOLDS, strict=False)]
        )

    @torch.no_grad()
    def confirm(self, index: int, features: Tensor) -> None:
        """Learns of one more video of a domain, without the others: (frames, features).

        Its threshold lets in what is as far away as this video was, up to what so many videos allow.
        """
        self._check_index(index)
        count = int(self.counts[index])
        if count == 0:
            return self.fit(index, features, [0] * len(features))
        features = self._check(features)
        parts = [x[index].double().split(self.kinds, -1) for x in (self.means, self.noises, self.factors)]
        normals = []
        for kind, (normal, values) in enumerate(
            zip(zip(*parts, strict=True), features.split(self.kinds, 1), strict=True)
        ):
            known = _Normal(*normal)
            farthest = known.measure(values)[0].max() * (1 + (count + 1) ** -0.5)
            allowed = farthest.clamp(max=_limit(MAX_THRESHOLDS[kind], count + 1))
            self.thresholds[index, kind] = allowed.float().maximum(self.thresholds[index, kind])
            normals.append(known.with_video(values, count))
        self.counts[index] = count + 1
        self.means[index], self.noises[index], self.factors[index] = (
            torch.cat(part, -1) for part in zip(*normals, strict=True)
        )

    def distances_between(self) -> np.ndarray:
        """How far the mean of each domain, a row, is from each: (domains, domains), where a domain's threshold is at 1.

        Distances of and from domains that are not known yet are infinite.
        """
        distances = self.decide(self.means).distances
        return distances.masked_fill(self.counts[:, None] == 0, torch.inf).cpu().numpy()

    def append_unknown(self, domain: str) -> None:
        """Appends a domain that is not known yet."""
        self.merge(DomainGate(self.kinds, [domain]))

    def rename(self, index: int, domain: str) -> None:
        """Gives a domain another name."""
        self._check_index(index)
        self.domains[index] = domain
        self.names[index] = _hashed(domain)

    def remove(self, index: int) -> None:
        """Forgets a domain; those after it move up by one."""
        self._check_index(index)
        del self.domains[index]
        for name, buffer in list(self.named_buffers()):
            setattr(self, name, torch.cat([buffer[:index], buffer[index + 1 :]]))

    def merge(self, other: "DomainGate") -> None:
        """Appends another gate's domains, which were learned with the same encoder."""
        if other.kinds != self.kinds:
            raise InputError(f"other gate has {_listed(other.kinds)} features, and this one {_listed(self.kinds)}")
        self.domains += other.domains
        for name, buffer in list(self.named_buffers()):
            setattr(self, name, torch.cat([buffer, other.get_buffer(name).to(buffer.device)]))

    def problem(self) -> str | None:
        """What is wrong with values that were loaded; None if nothing is."""
        known = self.counts > 0
        if self.names.tolist() != self._expected_names():
            return "are of other domains than the configuration's, or in another order"
        if (self.counts < 0).any():
            return "count fewer than 0 videos"
        if not (self.noises[known] > 0).all() or not (self.thresholds[known] > 0).all():
            return "have a spread or a threshold that is not above 0, so that distances are not finite"
        return None

    def _expected_names(self) -> list[int]:
        return [_hashed(domain) for domain in self.domains]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """As in the base class, each row to the domain of its name."""
        names, own = state_dict.get(f"{prefix}names"), self._expected_names()
        if names is not None and names.shape == self.names.shape and names.tolist() != own:
            found = names.tolist()
            if sorted(found) == sorted(own):
                rows = [found.index(name) for name in own]
                for name, _ in self.named_buffers():
                    if (buffer := state_dict.get(prefix + name)) is not None and len(buffer) == len(rows):
                        state_dict[prefix + name] = buffer[rows]
            else:
                args[-1].append(f"{prefix[:-1]} is of other domains than this model's, {', '.join(self.domains)}.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise InputError(f"features must be (rows, {self.num_features}), not {tuple(features.shape)}")
        if not features.isfinite().all():
            raise InputError("features have values that are not finite")
        return features.detach().to(self.means.device, torch.float64)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise InputError(f"index must be that of one of {len(self)} domains, not {index}")

    def _apply(self, fn, recurse: bool = True) -> "DomainGate":
        """Moves the buffers as `fn` does, but keeps their types: what is known survives `model.to(torch.bfloat16)`."""
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):
            if buffer.dtype != kept[name].dtype:
                source = buffer if kept[name].is_meta else kept[name]
                setattr(self, name, source.to(buffer.device, kept[name].dtype))
        return self


def _hashed(domain: str) -> int:
    """A number for a domain's name, since files hold numbers alone. transformers reads it as a float32, exactly."""
    return int.from_bytes(hashlib.sha256(domain.encode()).digest()[:3], "big")


def _listed(kinds: Sequence[int]) -> str:
    return " + ".join(map(str, kinds))


def _threshold(features: Tensor, videos: Tensor, limit: float) -> Tensor:
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
        squares, _ = _Normal.fit(features[~left_out], videos[~left_out]).measure(features[left_out])
        farthest.scatter_reduce_(0, units[left_out], squares, "amax")
    # The largest of n distances is exceeded by the next video's with probability 1 / (n + 1).
    seen = farthest.quantile(QUANTILE, interpolation="higher") * (1 + count**-0.5)
    threshold = torch.maximum(seen, _prediction_bound(farthest.clamp(min=SMALLEST_VARIANCE).log()).exp())
    return threshold.clamp(SQUARE_FLOOR, _limit(limit, count))


def _limit(few: float, count: int) -> float:
    """The widest threshold of a domain of `count` videos; `few` is that of a few."""
    return few * max(1.0, count / ENOUGH_VIDEOS)


def _widening(count: int) -> float:
    """By how much a further video varies more than `count` videos around their own mean."""
    return (count + 1) / max(count - 1, 0.5)


def _shrinkage(count: int) -> float:
    """The part of a covariance of `count` videos that is not believed."""
    return max(PRIOR_VIDEOS / (count + PRIOR_VIDEOS), MIN_SHRINKAGE)


def _prediction_bound(values: Tensor) -> Tensor:
    """What a further value of a normal distribution that is known by n values stays below with probability QUANTILE."""
    count = len(values)
    z = NormalDist().inv_cdf(QUANTILE)
    # Student's t of count - 1 degrees of freedom, by its expansion (Abramowitz and Stegun, 26.7.5).
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96)
    t = sum(term / (count - 1) ** power for power, term in enumerate(terms))
    return values.mean() + t * (1 + 1 / count) ** 0.5 * values.std()


def build_domain_gate(config: Any) -> DomainGate | None:
    """A gate with room for the domains of a [`SamoeConfig`]; None if it has none."""
    return None if config.domains is None else DomainGate(num_pooled_features(config), config.domain_names)
