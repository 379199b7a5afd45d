"""Which domain's experts a video gets: what the user says, or what the gate decides from one frame.

The gate reads features of the plain encoder, without any domain's experts, of the frame where an object is first
prompted. What looks like no domain that it knows gets none, and so the base model's output, unless `unknown` says
otherwise: "nearest" gives it the experts of the domain that is likeliest, and "mix" half of what they add.
"""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .base import InferenceSession
from .base_model import SamoePreTrainedModel
from .base_modules import ImageFeatures
from .domain_experts import DomainUse, use_domain
from .domain_gate import NO_DOMAIN, pooled_features
from .errors import InputError
from .frame_step import encode_frames

# Lets the gate decide.
AUTO = "auto"
# Where a domain is less likely than this among all, its rivals are told: those that are likelier than `RIVAL`.
CLEAR, RIVAL = 0.95, 0.05
# How much the experts of the likeliest domain add in a video of none, by `unknown`.
STRENGTHS = {"nearest": 1.0, "mix": 0.5}


class DomainDecision(NamedTuple):
    """Whose experts a video gets: a domain's name, or None for the base model.

    `confidence`: from 0 to 1, the gate's; None where the user has decided. `rivals`: where the gate took one of several
    domains that look alike, how likely each of them is, the domain itself first. `likely`: the same of what it looks
    most like, where the gate knows no such video. `unknown`: "nearest" or "mix", where such a video gets experts of
    `domain` nevertheless; then `confidence` is below 0.5.
    """

    domain: str | None
    confidence: float | None = None
    rivals: dict[str, float] | None = None
    likely: dict[str, float] | None = None
    unknown: str | None = None

    def by(self, unknown: str) -> "DomainDecision":
        """What the video gets by `unknown`, see [`SamoeConfig`]."""
        if unknown == "base" or not self.likely:
            return self
        assert self.confidence is not None  # the gate's, that it is of no domain
        nearest, likelihood = next(iter(self.likely.items()))
        rivals = self.likely if likelihood < CLEAR else None
        return DomainDecision(nearest, 1 - self.confidence, rivals, unknown=unknown)

    @property
    def use(self) -> DomainUse | None:
        """The experts that are run."""
        return None if self.domain is None else DomainUse(self.domain, STRENGTHS[self.unknown or "nearest"])


class SessionDecision(NamedTuple):
    """What the gate of a model with these domains decided for a session, on frame `frame_idx`."""

    decision: DomainDecision
    frame_idx: int
    model: weakref.ref
    domain_names: list[str]


def check_domain(model: SamoePreTrainedModel, domain: str | None) -> None:
    """Raises a `ValueError` if a model has no such domain; "auto" and None always are right."""
    names = model.config.domain_names
    if domain is None or domain == AUTO or (isinstance(domain, str) and domain in names):
        return
    known = ", ".join(map(repr, names)) if names else "none, since its experts belong to no domains"
    raise InputError(f'`domain` must be "auto", None or a domain of the model ({known}), got {domain!r}.')


def encoder_has_experts(model: SamoePreTrainedModel) -> bool:
    """Whether the image encoder gives different features in different domains. Cheap, since each frame asks."""
    layers = () if model.config.domains is None else model.expert_module_names
    return any(name.startswith("vision_encoder.") for name in layers)


@torch.no_grad()
def decide_domains(
    model: SamoePreTrainedModel, pixel_values: Tensor, features: ImageFeatures | None
) -> list[DomainDecision]:
    """What the gate decides for some frames.

    Args:
        pixel_values: (rows, 3, S, S).
        features: of the plain encoder, if the frames are encoded already.
    """
    if features is None:
        with use_domain(None):
            features = encode_frames(model, pixel_values)
    assert model.domain_gate is not None  # a model with domains has one
    decided = model.domain_gate.decide(pooled_features(features, pixel_values))
    names = [*model.config.domain_names, None]  # an index of -1 stands for none
    found = zip(*(part.tolist() for part in (decided.domain, decided.confidence, decided.likelihoods)), strict=True)
    decisions = []
    for index, sure, likelihoods in found:
        order = sorted(range(len(likelihoods)), key=lambda i: -likelihoods[i])
        first = order[0] if index == NO_DOMAIN and any(likelihoods) else index
        likely = {names[i]: likelihoods[i] for i in order if i == first or likelihoods[i] > RIVAL}
        if index == NO_DOMAIN:
            decisions.append(DomainDecision(None, sure, likely=likely))
        else:
            decisions.append(DomainDecision(names[index], sure, likely if likelihoods[index] < CLEAR else None))
    return decisions


def resolve_clip_domains(
    model: SamoePreTrainedModel,
    domain: str | Sequence[str | None] | None,
    first_frames: Tensor,
    features: ImageFeatures | None,
) -> list[DomainDecision]:
    """Whose experts each clip gets.

    Args:
        domain: of all, or of each; "auto" where the gate decides.
        first_frames: (clips, 3, S, S).
        features: of `first_frames`, if they are encoded already.

    Raises:
        ValueError: for a domain that the model does not have, or another number of them.
    """
    domains = [domain] * len(first_frames) if domain is None or isinstance(domain, str) else list(domain)
    if len(domains) != len(first_frames):
        raise InputError(f"`domain` must be one for all {len(first_frames)} clips or one for each, got {len(domains)}.")
    for name in domains:
        check_domain(model, name)
    if AUTO not in domains or model.config.domains is None:
        return [DomainDecision(None if name == AUTO else name) for name in domains]
    decided = [one.by(model.config.unknown) for one in decide_domains(model, first_frames, features)]
    return [decided[i] if name == AUTO else DomainDecision(name) for i, name in enumerate(domains)]


def session_domain(model: SamoePreTrainedModel, session: InferenceSession) -> DomainDecision | None:
    """Whose experts a session gets from a model; None where the gate has yet to decide.

    Raises:
        ValueError: if the session's `domain` is none of the model's.
    """
    chosen = getattr(session, "domain", AUTO)
    check_domain(model, chosen)
    if chosen != AUTO or model.config.domains is None:
        return DomainDecision(None if chosen == AUTO else chosen)
    decided: SessionDecision | None = getattr(session, "domain_decision", None)
    if decided is None or decided.model() is not model or decided.domain_names != model.config.domain_names:
        return None
    return decided.decision.by(_unknown(model, session))


def _unknown(model: SamoePreTrainedModel, session: InferenceSession) -> str:
    """What the session gets if it is of no known domain."""
    return getattr(session, "unknown", None) or model.config.unknown


def is_decision_due(session: InferenceSession, frame_idx: int) -> bool:
    """Whether a session wants the gate to look again on a frame, see [`samoe_hf.VideoSession`]."""
    interval, decided = getattr(session, "domain_interval", None), getattr(session, "domain_decision", None)
    return interval is not None and decided is not None and abs(frame_idx - decided.frame_idx) >= interval


def store_decision(
    model: SamoePreTrainedModel, session: InferenceSession, frame_idx: int, decision: DomainDecision
) -> DomainDecision:
    """Stores what the gate decided for a session on a frame, and gives whose experts it gets."""
    known = SessionDecision(decision, frame_idx, weakref.ref(model), model.config.domain_names)
    setattr(session, "domain_decision", known)  # noqa: B010  # a session of transformers' own has no such attribute
    return decision.by(_unknown(model, session))
