"""The gate that recognizes which domain a video belongs to, from a frozen encoder's features of one frame.

Each domain is described by itself: a normal distribution of pooled features, and how far from it a video may be. So a
domain is added without the data of others, and no other domain's description changes when one is added, removed or
merged. Nothing of single frames is kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .experts import DOMAIN_GATE
from .frame_step import ImageFeatures

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
# The widest threshold, where 1 is the expected distance. Few videos left out one by one seem too far away.
MAX_THRESHOLD = 4.0


class GateDecision(NamedTuple):
    """What [`DomainGate.decide`] finds for each row.

    `domain` (rows,): index of the domain, or `NO_DOMAIN`. `confidence` (rows,): 1 is certain, 0.5 is on the threshold,
    and less is for a domain that another one rivals. `distances` (rows, domains): a domain's threshold is at 1.
    """

    domain: Tensor
    confidence: Tensor
    distances: Tensor


def pooled_features(image: ImageFeatures) -> Tensor:
    """What the gate sees of frames: (rows, hidden / 4) float32.

    They are mean and standard deviation of each channel of the finest features, which show texture and noise best.
    """
    fine = image.fine.float()
    return torch.cat([fine.mean((2, 3)), fine.std((2, 3), correction=0)], dim=1)


def num_pooled_features(config: PreTrainedConfig) -> int:
    """How many features [`pooled_features`] gives for a model of this configuration."""
    return config.mask_decoder_config.hidden_size // 4


def add_domain_gate(model: nn.Module) -> None:
    """Gives a model whose configuration has domains a gate with room for them, and any other none."""
    domains = model.config.domains
    gate = None if domains is None else DomainGate(num_pooled_features(model.config), len(domains))
    model.add_module(DOMAIN_GATE, gate)


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
        # A few videos vary less around their own mean than a further one does.
        covariance = (weights * centered).T @ centered * ((count + 1) / max(count - 1, 0.5))
        variances = covariance.diagonal()
        shrinkage = max(PRIOR_VIDEOS / (count + PRIOR_VIDEOS), MIN_SHRINKAGE)
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        strongest = eigenvalues[-RANK:].clamp(min=0) * (1 - shrinkage)
        factors = features.new_zeros(RANK, features.shape[1])
        factors[: len(strongest)] = strongest.sqrt()[:, None] * eigenvectors[:, -RANK:].T
        floor = VARIANCE_FLOOR * variances.mean() + SQUARE_FLOOR * mean.square().mean() + SMALLEST_VARIANCE
        return cls(mean, variances - factors.square().sum(0) + floor, factors)

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
    """Recognizes domains by pooled features of a frozen encoder. All it knows are buffers, kept in float32.

    A row is given to the domain under which it is most likely, if it is not farther from it than the domain's own
    videos are when they are left out of its description; otherwise to none.

    The buffers are `counts` (domains,), the number of videos, 0 for a domain that is not known yet and is never chosen;
    `means` and `noises` (domains, features), and `factors` (domains, RANK, features), see [`_Normal`]; `thresholds`
    (domains,), squared Mahalanobis distances per feature.

    Args:
        num_features: length of the pooled features.
        num_domains: domains that are not known yet, to be loaded or fitted.
    """

    def __init__(self, num_features: int, num_domains: int = 0):
        super().__init__()
        if num_features < 1 or num_domains < 0:
            raise ValueError(
                f"num_features must be at least 1 and num_domains at least 0, not {num_features} and {num_domains}"
            )
        self.num_features = num_features
        shape = (num_domains, num_features)
        self.register_buffer("counts", torch.empty(num_domains, dtype=torch.long))
        self.register_buffer("means", torch.empty(shape, dtype=torch.float32))
        self.register_buffer("noises", torch.empty(shape, dtype=torch.float32))
        self.register_buffer("factors", torch.empty(num_domains, RANK, num_features, dtype=torch.float32))
        self.register_buffer("thresholds", torch.empty(num_domains, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets what is known, but not how many domains there are."""
        for name, buffer in self.named_buffers():
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
            return GateDecision(domain, features.new_ones(rows), features.new_full((rows, len(self)), torch.inf))
        normals = _Normal(self.means.double(), self.noises.double(), self.factors.double())
        squares, log_densities = normals.measure(features)
        ratios = (squares.T / self.thresholds.double()).masked_fill(~known, torch.inf)
        probabilities = log_densities.T.masked_fill(~known, -torch.inf).softmax(dim=1)
        probability, domain = probabilities.max(dim=1)
        ratio = ratios.gather(1, domain[:, None])[:, 0]
        inside = ratio <= 1
        confidence = torch.where(inside, torch.minimum(probability, 1 / (1 + ratio)), ratio / (1 + ratio))
        return GateDecision(domain.where(inside, NO_DOMAIN), confidence, ratios.sqrt())

    @torch.no_grad()
    def fit(self, index: int, features: Tensor, videos: Sequence | Tensor) -> None:
        """Learns one domain, anew if it is known; see [`add`]."""
        self._check_index(index)
        features = self._check(features)
        ids = videos.tolist() if isinstance(videos, Tensor) else list(videos)
        if len(ids) != len(features) or not ids:
            raise ValueError(
                f"videos must name the video of each of the {len(features)} frames (at least one), not {len(ids)}"
            )
        order = {name: number for number, name in enumerate(sorted(set(ids), key=str))}
        videos = torch.tensor([order[name] for name in ids], device=features.device)
        normal = _Normal.fit(features, videos)
        self.counts[index] = len(order)
        self.means[index], self.noises[index], self.factors[index] = normal
        self.thresholds[index] = _threshold(features, videos)

    def add(self, features: Tensor, videos: Sequence | Tensor) -> None:
        """Appends a domain. What is known of the others does not change.

        Of a single video, only frames like its own are recognized later, since it does not show how videos differ.

        Args:
            features: (frames, features) of frames of the domain.
            videos: (frames,) which video each frame is of: numbers or names.

        Raises:
            ValueError: no frames, another number of features or of videos, or values that are not finite.
        """
        domain = DomainGate(self.num_features, 1).to(self.means.device)
        domain.fit(0, features, videos)
        self.merge(domain)

    def append_unknown(self) -> None:
        """Appends a domain that is not known yet."""
        self.merge(DomainGate(self.num_features, 1))

    def remove(self, index: int) -> None:
        """Forgets a domain; those after it move up by one."""
        self._check_index(index)
        for name, buffer in list(self.named_buffers()):
            setattr(self, name, torch.cat([buffer[:index], buffer[index + 1 :]]))

    def merge(self, other: "DomainGate") -> None:
        """Appends another gate's domains, which were learned with the same encoder."""
        if other.num_features != self.num_features:
            raise ValueError(f"other gate has {other.num_features} features, and this one {self.num_features}")
        for name, buffer in list(self.named_buffers()):
            setattr(self, name, torch.cat([buffer, other.get_buffer(name).to(buffer.device)]))

    def _check(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"features must be (rows, {self.num_features}), not {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError("features have values that are not finite")
        return features.detach().to(self.means.device, torch.float64)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise ValueError(f"index must be that of one of {len(self)} domains, not {index}")

    def _apply(self, fn, recurse: bool = True) -> "DomainGate":
        """Moves the buffers as `fn` does, but keeps their types: what is known survives `model.to(torch.bfloat16)`."""
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):
            if buffer.dtype != kept[name].dtype:
                source = buffer if kept[name].is_meta else kept[name]
                setattr(self, name, source.to(buffer.device, kept[name].dtype))
        return self


def _threshold(features: Tensor, videos: Tensor) -> Tensor:
    """The squared distance per feature within which a further video of a domain is expected.

    It is a quantile of the distances of the domain's own videos, each measured while it is left out, with room for the
    videos that were not there. Where nothing can be left out, it is twice the expected distance.
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
    threshold = farthest.quantile(QUANTILE, interpolation="higher") * (1 + count**-0.5)
    return threshold.clamp(SQUARE_FLOOR, MAX_THRESHOLD)
