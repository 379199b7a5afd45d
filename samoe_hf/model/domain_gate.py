"""The gate that recognizes a video's domain, from a frozen encoder's features of one frame and from its picture.

Each domain is described by itself: a normal distribution of pooled features, and how far from it a video may be. What
is learned of domains is in the package's `surgery/gate.py`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base_modules import ImageFeatures, KeepsTypes
from .errors import InputError

# The index of a video that looks like no known domain.
NO_DOMAIN = -1
# Directions in which a domain's features vary together; beyond them, features count as independent.
RANK = 16
# Features vary together in more ways than a domain's description has: the logarithms of likelihoods differ by so many
# times more than they should, without and with further features. Measured on a hundred domains, see docs/domains.md.
OVERCONFIDENCE = (6.0, 8.0)
# How many kinds of features refuse a row, and what names of buffers begin with that are of further ones too: of what
# tells the likelier domain, and of what refuses a row.
KINDS, FURTHER, REFUSING = 2, "further_", "further_refusing_"
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
    """What the gate sees of frames (rows, 3, S, S), as the encoder gets them: (rows, hidden / 4 + 45) float32.

    First mean and standard deviation of each channel of the finest features, which show texture and noise as the plain
    encoder knows them. Then the logarithm of the picture's contrast in each colour at each scale: what an encoder that
    saw one domain alone ignores of others still tells kinds of pictures apart. Then what else there is of each
    contrast: how much it differs over the picture, as it does with edges, and whether it grows with the lightness.
    """
    fine = image.fine.float()
    encoded = [fine.mean((2, 3)), fine.std((2, 3), correction=0)]
    return torch.cat([*encoded, *_contrasts(pixel_values.to(fine.device))], dim=1)


def _contrasts(pixel_values: Tensor) -> list[Tensor]:
    """For each scale from fine to coarse, the logarithm of the contrast in each colour that the next scale loses; then
    for each scale how much it differs over the picture, and its correlation with the lightness, each (rows, colours).
    """
    colours = pixel_values.new_tensor(COLOURS, dtype=torch.float32)[..., None, None]
    picture = (colours * pixel_values.float()[:, None]).sum(2)  # no matrix product, which autocast would round
    contrasts, further = [], []
    for _ in range(SCALES):
        coarser = F.avg_pool2d(picture, 2, ceil_mode=True)
        lost = picture - F.interpolate(coarser, scale_factor=2)[..., : picture.shape[2], : picture.shape[3]]
        contrasts.append((lost.square().mean((2, 3)).sqrt() + SMALLEST_CONTRAST).log())
        local = (F.avg_pool2d(lost.square(), 2, ceil_mode=True).sqrt() + SMALLEST_CONTRAST).log()
        local, light = (x - x.mean((2, 3), keepdim=True) for x in (local, coarser[:, :1]))
        spread = local.square().mean((2, 3)).sqrt()
        covariance, light_spread = (local * light).mean((2, 3)), light.square().mean((2, 3)).sqrt()
        further += [spread, covariance / (spread * light_spread + 0.01)]  # no correlation where either hardly varies
        picture = coarser
    return contrasts + further


def num_pooled_features(config: Any) -> tuple[int, int, int]:
    """How many features [`pooled_features`] gives: the encoder's, the picture's, and further ones of the picture."""
    picture = SCALES * len(COLOURS)
    return config.mask_decoder_config.hidden_size // 4, picture, 2 * picture


class Normal(NamedTuple):
    """A normal distribution of covariance diag(`noise`) + `factors`^T `factors`, for one domain or a batch of them.

    `mean` and `noise` (..., features), `factors` (..., RANK, features).
    """

    mean: Tensor
    noise: Tensor
    factors: Tensor

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


class DomainGate(KeepsTypes):
    """Recognizes domains by pooled features of a frozen encoder. All it knows are buffers, kept in float32. Its rows
    are those of domains by name: loading a state dict, whatever its order, brings each row to its domain.

    A row is given to the domain under which it is most likely, if it is not farther from it than the domain's own
    videos are when they are left out of its description; otherwise to none. Features may be of several kinds, which
    count as independent: a row must be near enough in each of them. Further features, together with those of the last
    kind, tell which domain is likelier, and instead of the last kind alone whether a row is near enough. Domains of
    older files are not known by them: they refuse as they did, and beside them the last kind tells what is likelier.

    The buffers are `names` (domains,), a hash of each domain's name; `counts` (domains,), the number of videos, 0 for
    a domain that is not known yet and is never chosen; `means` and `noises` (domains, features), and `factors`
    (domains, RANK, features), see [`Normal`]; `thresholds` (domains, kinds), squared Mahalanobis distances; and
    `further_means`, `further_noises` and `further_factors` of the last kind and the further features, 0 if not known.
    `further_refusing_means` and so on, with `further_refusing_thresholds` (domains,), tell how near a row is.

    Args:
        num_features: length of the pooled features, or how many there are of each of two kinds, one kind after the
            other, and of further features.
        domains: names of domains that are not known yet, to be loaded or fitted.
    """

    names: Tensor
    counts: Tensor
    means: Tensor
    noises: Tensor
    factors: Tensor
    thresholds: Tensor
    further_means: Tensor
    further_noises: Tensor
    further_factors: Tensor
    further_refusing_means: Tensor
    further_refusing_noises: Tensor
    further_refusing_factors: Tensor
    further_refusing_thresholds: Tensor

    def __init__(self, num_features: int | Sequence[int], domains: Sequence[str] = ()):
        super().__init__()
        self.sizes = (num_features,) if isinstance(num_features, int) else tuple(num_features)
        self.num_features, self.kinds = sum(self.sizes), self.sizes[:KINDS]
        self.domains, num_domains = list(domains), len(domains)
        self.register_buffer("names", torch.empty(num_domains, dtype=torch.long))
        self.register_buffer("counts", torch.empty(num_domains, dtype=torch.long))
        with_further = sum(self.sizes[KINDS - 1 :])
        described = {"": sum(self.kinds), FURTHER: with_further, REFUSING: with_further}
        for prefix in described if self.has_further else [""]:
            count = described[prefix]
            self.register_buffer(f"{prefix}means", torch.empty(num_domains, count, dtype=torch.float32))
            self.register_buffer(f"{prefix}noises", torch.empty(num_domains, count, dtype=torch.float32))
            self.register_buffer(f"{prefix}factors", torch.empty(num_domains, RANK, count, dtype=torch.float32))
        self.register_buffer("thresholds", torch.empty(num_domains, len(self.kinds), dtype=torch.float32))
        if self.has_further:
            self.register_buffer(f"{REFUSING}thresholds", torch.empty(num_domains, dtype=torch.float32))
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

    def normals(self, rows: int | slice = slice(None)) -> list[Normal]:
        """The distributions of domains, or of one: one for each kind of features."""
        parts = [x[rows].double().split(self.kinds, -1) for x in (self.means, self.noises, self.factors)]
        return [Normal(*kind) for kind in zip(*parts, strict=True)]

    @property
    def has_further(self) -> bool:
        """Whether there are further features."""
        return self.sizes != self.kinds

    def knows_further(self, prefix: str = FURTHER) -> Tensor:
        """Which domains are known by further features, or refuse by them: (domains,)."""
        known = self.counts > 0
        return known & (self.get_buffer(f"{prefix}noises") > 0).all(1) if self.has_further else known & False

    def further_normal(self, prefix: str = FURTHER, rows: int | slice = slice(None)) -> Normal:
        """The distribution of the last kind with further features, where known, of one domain or of all."""
        parts = (self.get_buffer(prefix + name)[rows].double() for name in ("means", "noises", "factors"))
        mean, noise, factors = parts
        return Normal(mean, noise.where(noise > 0, 1), factors)

    def split(self, features: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features of each kind; and those of the last kind with further ones."""
        kinds = features[:, : sum(self.kinds)].split(self.kinds, 1)
        return [*kinds], features[:, sum(self.kinds[:-1]) :]

    @torch.no_grad()
    def decide(self, features: Tensor) -> GateDecision:
        """Which domain each row of (rows, features) belongs to."""
        features = self.checked(features)
        rows, known = len(features), self.counts > 0
        if not known.any():
            domain = torch.full((rows,), NO_DOMAIN, device=features.device)
            distances = features.new_full((rows, len(self)), torch.inf)
            return GateDecision(domain, features.new_ones(rows), distances, torch.zeros_like(distances))
        kinds, further = self.split(features)
        squares, log_densities = zip(*map(Normal.measure, self.normals(), kinds), strict=True)
        ratios = torch.stack(squares, -1) / self.thresholds.double()[:, None]  # (domains, rows, kinds)
        overconfidence, refusing = OVERCONFIDENCE[0], self.knows_further(REFUSING)
        if refusing.any():
            further_squares = self.further_normal(REFUSING).measure(further)[0]
            further_ratios = further_squares / self.further_refusing_thresholds.double()[:, None]
            ratios[..., -1] = further_ratios.where(refusing[:, None], ratios[..., -1])
        if (self.knows_further() == known).all():
            overconfidence = OVERCONFIDENCE[1]
            log_densities = *log_densities[:-1], self.further_normal().measure(further)[1]
        ratios = ratios.amax(-1).T.masked_fill(~known, torch.inf)
        log_density = torch.stack(log_densities).sum(0).T.masked_fill(~known, -torch.inf)
        domain, likelihoods = log_density.argmax(dim=1), (log_density / overconfidence).softmax(dim=1)
        probability = likelihoods.gather(1, domain[:, None])[:, 0]
        ratio = ratios.gather(1, domain[:, None])[:, 0]
        inside = ratio <= 1
        confidence = torch.where(inside, torch.minimum(probability, 1 / (1 + ratio)), ratio / (1 + ratio))
        return GateDecision(domain.where(inside, NO_DOMAIN), confidence, ratios.sqrt(), likelihoods)

    def problem(self) -> str | None:
        """What is wrong with values that were loaded; None if nothing is."""
        known = self.counts > 0
        if self.names.tolist() != self._expected_names():
            return "are of other domains than the configuration's, or in another order"
        if (self.counts < 0).any():
            return "count fewer than 0 videos"
        thresholds = [self.thresholds[known]]
        if self.has_further:
            thresholds.append(self.further_refusing_thresholds[self.knows_further(REFUSING)])
        if not (self.noises[known] > 0).all() or not all((values > 0).all() for values in thresholds):
            return "have a spread or a threshold that is not above 0, so that distances are not finite"
        return None

    def _expected_names(self) -> list[int]:
        return [hashed_name(domain) for domain in self.domains]

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

    def checked(self, features: Tensor) -> Tensor:
        """Features (rows, features) as float64; `InputError` for another number, or values that are not finite."""
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise InputError(f"features must be (rows, {self.num_features}), not {tuple(features.shape)}")
        if not features.isfinite().all():
            raise InputError("features have values that are not finite")
        return features.detach().to(self.means.device).double()

    def _apply(self, fn: Any, recurse: bool = True) -> KeepsTypes:
        """Stays on the CPU in place of Apple's GPUs, which have no float64."""
        return self if fn(self.means.new_empty(0)).device.type == "mps" else super()._apply(fn, recurse)


def hashed_name(domain: str) -> int:
    """A number for a domain's name, since files hold numbers alone. transformers reads it as a float32, exactly."""
    return int.from_bytes(hashlib.sha256(domain.encode()).digest()[:3], "big")


def build_domain_gate(config: Any) -> DomainGate | None:
    """A gate with room for the domains of a [`SamoeConfig`]; None if it has none."""
    return None if config.domains is None else DomainGate(num_pooled_features(config), config.domain_names)
