"""What a study of forgetting does: its domains, orders, seeds and sizes, from a YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from samoe_hf.continual.start import reduced
from samoe_hf.data.options import check_options
from samoe_hf.data.registry import read_yaml, videos_from_entry
from samoe_hf.data.schema import Video, evenly_chosen
from samoe_hf.errors import InputError
from samoe_hf.model.configuration_samoe import check_domain_name


@dataclass(frozen=True)
class StudyDomain:
    """A domain of a study.

    Attributes:
        name: its name.
        train_data, eval_data: datasets, as in a run's YAML. A `root` of None must be given when the study is read.
        steps: of training on it.
        zoom: where given, videos are cropped to a square of this many times the side of what all objects cover.
        from_largest: whether held-out videos are scored from the frame with the largest masks to the last that shows an
            object, and back to the first, as two videos: volumes are prompted on a middle slice.
        looks_like: a domain that this one is hard to tell from.
        augmentation: of training clips, as in a run's YAML; none by default.
    """

    name: str
    train_data: list[dict[str, Any]]
    eval_data: list[dict[str, Any]]
    steps: int
    zoom: float | None = None
    from_largest: bool = False
    looks_like: str | None = None
    augmentation: dict[str, Any] | None = None

    @property
    def is_found(self) -> bool:
        """Whether the folders of all its datasets are known."""
        return all(entry.get("root", "") is not None for entry in [*self.train_data, *self.eval_data])

    def with_root(self, root: str) -> StudyDomain:
        """The domain with its datasets in a folder, where they name none."""

        def fill(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{**e, "root": root} if "root" in e and e["root"] is None else e for e in entries]

        return replace(self, train_data=fill(self.train_data), eval_data=fill(self.eval_data))


@dataclass(frozen=True)
class StudyPlan:
    """A study: a base model learns domain after domain, with each method, in each order, from each seed.

    Attributes:
        model_config: YAML of the model, which the study trains from scratch on the domain `base`; or its name in the
            package.
        base, domains: what is learned.
        orders: names of domains, in the order in which they are learned.
        seeds: each trains a base of its own.
        expert_modules, exclude_modules: layers with LoRAs or experts, the same for all methods.
        lora_rank: of a domain's own LoRA. All methods have as many parameters per domain, if their name does not say
            something else.
        experts_per_domain: where a domain has several experts, so many, of `lora_rank / experts_per_domain` each.
        lora_alpha: a LoRA of rank r is scaled by `lora_alpha / r`; experts by `lora_alpha / lora_rank`.
        learning_rate, full_learning_rate, base_learning_rate: of LoRAs and experts; of the base's own parameters when
            it is fine-tuned; and when it is trained from scratch.
        num_frames, max_objects, batch_size: of training clips.
        eval_videos, eval_frames: so many held-out videos of each domain are scored, so many frames of each.
        gate_videos: so many videos of each domain are shown to the gate, and as many held-out frames test it.
        router_frames: so many frames of each domain are tracked to compute token routers.
        timing_frames: frames of the video that time per frame is measured on.
    """

    model_config: str
    base: StudyDomain
    domains: list[StudyDomain]
    orders: list[list[str]]
    seeds: list[int]
    expert_modules: list[str]
    exclude_modules: list[str]
    lora_rank: int = 8
    experts_per_domain: int = 2
    lora_alpha: float = 16.0
    learning_rate: float = 2e-3
    full_learning_rate: float = 5e-4
    base_learning_rate: float = 1e-3
    num_frames: int = 4
    max_objects: int = 3
    batch_size: int = 4
    eval_videos: int = 8
    eval_frames: int = 8
    gate_videos: int = 64
    router_frames: int = 100
    timing_frames: int = 40

    def __post_init__(self) -> None:
        names = [domain.name for domain in [self.base, *self.domains]]
        for name in names:
            check_domain_name(name)
            if "-" in name:  # which joins the names of an order
                raise InputError(f"`name` must be without -, got {name!r}.")
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"`domains` has two of the name {twice[0]!r}.")
        for order in self.orders:
            if unknown := sorted(set(order) - {domain.name for domain in self.domains}):
                raise InputError(f"`orders` has {unknown[0]!r}, which is none of `domains`.")
            if sorted(order) != sorted(self.orders[0]):
                raise InputError(f"`orders` must hold the same domains each, got {self.orders[0]} and {order}.")
        if not self.orders or not self.orders[0] or not self.seeds:
            raise InputError("`orders` and `seeds` must hold at least one each, and an order at least one domain.")
        if self.lora_rank % self.experts_per_domain:
            raise InputError(
                f"`lora_rank` must be a multiple of `experts_per_domain` ({self.experts_per_domain}), got "
                f"{self.lora_rank}."
            )

    @property
    def num_domains(self) -> int:
        return len(self.orders[0])

    def domain(self, name: str) -> StudyDomain:
        """The domain of a name, the base's among them."""
        return next(domain for domain in [self.base, *self.domains] if domain.name == name)

    def identity(self) -> dict[str, Any]:
        """What results depend on, as JSON holds it: neither which seeds and orders are run, nor where the data lie."""
        content = {name: value for name, value in asdict(self).items() if name not in ("seeds", "orders")}
        content["model_config"] = config_name(self.model_config)
        for domain in [content["base"], *content["domains"]]:
            for entry in [*domain["train_data"], *domain["eval_data"]]:
                entry.pop("root", None)
        return content | {"learned": sorted(self.orders[0])}


def config_name(model_config: str) -> str:
    """The name of a configuration, wherever its file lies: `model_nano` of `configs/model_nano.yaml`."""
    return Path(model_config).name.removesuffix(".yaml")


def read_plan(path: str | Path, roots: Mapping[str, str] | None = None, quick: bool = False) -> StudyPlan:
    """Reads a study's YAML. Domains whose folders nobody names are left out.

    Args:
        roots: domain -> folder of its datasets.
        quick: whether the YAML's `quick` is laid over it: other values of its keys, and `steps` and `base_steps`.

    Raises:
        ValueError: for an unknown key or domain, a value of another type, or one that does not fit the others.
    """
    content = read_yaml(path)
    overrides = content.pop("quick", None) or {}
    content |= overrides if quick else {}
    steps, base_steps = content.pop("steps", None), content.pop("base_steps", None)
    check_options(StudyPlan, content, f"studies, such as {path},")
    base = _read_domain(content.pop("base"), base_steps)
    domains = [_read_domain(entry, steps) for entry in content.pop("domains")]
    for name, root in (roots or {}).items():
        if name not in [domain.name for domain in domains]:
            raise InputError(f"`--root` names {name!r}, which is none of the domains of {path}.")
        domains = [domain.with_root(root) if domain.name == name else domain for domain in domains]
    found = [domain for domain in domains if domain.is_found]
    left_out = {domain.name for domain in domains} - {domain.name for domain in found}
    orders = [[name for name in order if name not in left_out] for order in content.pop("orders")]
    return StudyPlan(base=base, domains=found, orders=orders, **content)


def _read_domain(entry: Mapping[str, Any], steps: int | None) -> StudyDomain:
    if not isinstance(entry, Mapping):
        raise InputError(f"A domain of a study must be a mapping with a `name`, got {entry!r}.")
    entry = {**entry, **({} if steps is None else {"steps": steps})}
    check_options(StudyDomain, entry, "domains of a study")
    return StudyDomain(**entry)


class StudyVideos:
    """The videos of a study's domains, at the model's size.

    Args:
        size: side of the model's input in pixels.
    """

    def __init__(self, plan: StudyPlan, size: int):
        self.plan, self.size = plan, size
        self._loaded: dict[tuple[str, str], Sequence[Video]] = {}

    def train(self, name: str) -> Sequence[Video]:
        """The training videos of a domain."""
        return self._load(name, "train_data")

    def held_out(self, name: str) -> Sequence[Video]:
        """All held-out videos of a domain."""
        return self._load(name, "eval_data")

    def scored(self, name: str, seed: int) -> list[Video]:
        """The held-out videos of a domain that are scored, from the first frame on that shows an object.

        Where there are more than are scored, each seed scores others.
        """
        key = (name, f"scored {seed}")
        if key not in self._loaded:
            videos = self.held_out(name)
            places = evenly_chosen(range(len(videos)), self.plan.eval_videos)
            chosen = [videos[(place + seed) % len(videos)] for place in places]
            if self.plan.domain(name).from_largest:
                chosen = [half for video in chosen for half in halves(video)]
            self._loaded[key] = []
            for video in chosen:
                first = video.first_visible
                frames = [t for t in video.annotated_frames if t >= first][: self.plan.eval_frames]
                self._loaded[key].append(reduced(video, self.size, frames))
        return self._loaded[key]

    def _prepared(self, video: Video, zoom: float | None) -> Video:
        video = cropped(video, zoom)
        return reduced(video, self.size, video.annotated_frames)

    def _load(self, name: str, kind: str) -> Sequence[Video]:
        if (name, kind) not in self._loaded:
            domain, entries = self.plan.domain(name), getattr(self.plan.domain(name), kind)
            lists = [videos_from_entry(entry, f"{kind}[{i}] of {name}") for i, entry in enumerate(entries)]
            videos = lists[0] if len(lists) == 1 else [video for videos in lists for video in videos]
            if domain.zoom is not None or tuple(videos[0].size) != (self.size, self.size):
                videos = [self._prepared(video, domain.zoom) for video in videos]
            self._loaded[name, kind] = videos
        return self._loaded[name, kind]


def cropped(video: Video, zoom: float | None) -> Video:
    """A video's annotated frames, renumbered from 0 on if there is a zoom.

    Args:
        zoom: crops to a square of this many times the side of what all objects cover; None leaves the video as it is.
    """
    if zoom is None:
        return video
    frames = [np.asarray(video.frames[t]) for t in video.annotated_frames]
    masks = np.stack([video.masks(t) for t in video.annotated_frames])
    rows, columns = np.nonzero(masks.any(axis=(0, 1)))
    if len(rows):
        side = min(*video.size, round(zoom * (1 + max(np.ptp(rows), np.ptp(columns)))))
        top, left = (
            int(np.clip((x.min() + x.max() + 1 - side) // 2, 0, extent - side))
            for x, extent in zip((rows, columns), video.size, strict=True)
        )
        window = (..., slice(top, top + side), slice(left, left + side))
        frames, masks = [frame[window[1:]] for frame in frames], masks[window]
    return Video.from_arrays(video.video_id, np.stack(frames), masks, video.object_ids, domain=video.domain)


def halves(video: Video) -> list[Video]:
    """A video from the frame with the largest masks to the last with any, and back from that frame to the first."""
    frames = [t for t in video.annotated_frames if video.visible(t)]
    largest = int(np.argmax([video.masks(t).sum() for t in frames]))
    parts = {"onward": frames[largest:], "back": frames[largest::-1]}
    size = video.size[0]
    return [replace(reduced(video, size, part), video_id=f"{video.video_id}_{name}") for name, part in parts.items()]
