"""What the experts of a model do: which of them the routers choose, for which domain, object and image position.

Everything is read off the routers while videos are tracked as [`evaluation.segment_video`] tracks them. Of each router
only sums over tokens are kept, so that memory does not grow with the length of the videos.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import Sam2VideoProcessor
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoSegmentationOutput

from samoe_hf.data.schema import Video, videos_from_dataset
from samoe_hf.data.video_io import write_video
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.evaluation.simulated_user import EvaluationPrompt, SimulatedUser
from samoe_hf.model.experts import ExpertLinear, expert_modules, record_router_logits, top_k_gates
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processor import build_processor
from samoe_hf.plots.experts import plot_bars, plot_heat_maps, plot_matrices, plot_routing, routing_video

# Parts of the model that run batched over objects; all others run once for a frame.
PARTS_BY_OBJECT = ("memory_attention.", "memory_encoder.", "mask_decoder.", "object_pointer_proj")
# An expert that a smaller share of the tokens chooses counts as dead.
DEAD_SHARE = 0.001
# Projections whose tokens are the image's positions; keys and values of the cross attention are of the memory.
IMAGE_PROJECTIONS = re.compile(r"memory_attention\.layers\.\d+\.(self_attn\.[qkvo]|cross_attn_image\.[qo])_proj")
IMAGE_LAYERS = re.compile(r"vision_encoder\.backbone\.blocks\.\d+\.mlp\..*")


class Source(NamedTuple):
    """What tokens come from. `object_id` is None where the tokens are of the frame and not of an object."""

    domain: str
    video_id: str
    object_id: int | None


@dataclass
class RouterSums:
    """What a router did, summed over tokens.

    `gates` (experts,): weights of the experts, which are 0 but for the top k. `probabilities` (experts,): softmax over
    all logits. `entropy`: of these probabilities, in nats. `chosen` (experts, experts): tokens that chose both experts,
    on the diagonal those that chose the expert.
    """

    tokens: int
    gates: np.ndarray
    probabilities: np.ndarray
    entropy: float
    chosen: np.ndarray

    @classmethod
    def of(cls, router_logits: Tensor, num_experts_per_tok: int) -> list["RouterSums"]:
        """Sums for each row of logits (rows, ..., experts)."""
        logits = router_logits.detach().float()
        logits = logits.reshape(len(logits), -1, logits.shape[-1])
        gates, probabilities = top_k_gates(logits, num_experts_per_tok), logits.softmax(dim=-1)
        top = logits.topk(num_experts_per_tok, dim=-1).indices
        # Not `gates > 0`: the weight of a chosen expert may be too small to be told from 0.
        chosen = torch.zeros_like(logits).scatter(-1, top, 1.0)
        entropy = torch.special.entr(probabilities).sum(dim=(-2, -1))
        sums = (gates.sum(dim=1), probabilities.sum(dim=1), entropy, chosen.mT @ chosen)
        arrays = (x.cpu().double().numpy() for x in sums)
        return [cls(logits.shape[1], g, p, float(e), c) for g, p, e, c in zip(*arrays, strict=True)]

    @classmethod
    def total(cls, parts: Iterable["RouterSums"]) -> "RouterSums":
        """The sum of at least one part."""
        columns = zip(*((p.tokens, p.gates, p.probabilities, p.entropy, p.chosen) for p in parts), strict=True)
        return cls(*(sum(column) for column in columns))

    @property
    def mean_gates(self) -> np.ndarray:
        """Mean weight of each expert (experts,), which add up to 1; the original's `get_expert_statistics`."""
        return self.gates / self.tokens

    @property
    def frequency(self) -> np.ndarray:
        """Share of the tokens that choose each expert (experts,); they add up to `num_experts_per_tok`."""
        return self.chosen.diagonal() / self.tokens

    @property
    def coactivation(self) -> np.ndarray:
        """Share of the tokens that choose both experts (experts, experts); the frequency on the diagonal."""
        return self.chosen / self.tokens

    @property
    def router_entropy(self) -> float:
        """Mean entropy of a token's probabilities over all experts, 1 where the router does not decide."""
        return self.entropy / self.tokens / _log_experts(self.gates)

    @property
    def load_balancing_loss(self) -> float:
        """[`experts.load_balancing_loss`] of these tokens."""
        return float(len(self.gates) * self.frequency @ self.probabilities / self.tokens)


def normalized_entropy(weights: np.ndarray) -> float:
    """Entropy of non-negative weights (experts,) that need not add up to 1: from 0, one has all, to 1, all are equal.

    Of a single expert it is 0.
    """
    shares = torch.from_numpy(weights / weights.sum())
    return float(torch.special.entr(shares).sum()) / _log_experts(weights)


def _log_experts(weights: np.ndarray) -> float:
    # A single expert has no entropy; any number above 0 makes it 0.
    return float(np.log(max(len(weights), 2)))


def mutual_information(usage: np.ndarray) -> float:
    """Mutual information of domain and expert in bits, all domains having equal weight.

    Args:
        usage: (domains, experts), each domain's mean gates, rows that add up to 1.

    Returns:
        0 when all domains use the experts alike (or there is one domain), and log2(domains) when no expert serves two.
    """
    usage = torch.from_numpy(usage)
    mixture = torch.special.entr(usage.mean(dim=0)).sum()
    of_domains = torch.special.entr(usage).sum(dim=1).mean()
    return max(0.0, float(mixture - of_domains)) / float(np.log(2))


@torch.no_grad()
def expert_similarity(module: ExpertLinear) -> np.ndarray:
    """Cosine similarity of the experts' updates B A, as matrices: (experts, experts), from -1 to 1.

    Rows and columns of experts whose update is zero, as those of new experts are, are NaN: they have no direction.
    """
    experts, rank = module.lora_A.shape[:2]
    # <B1 A1, B2 A2> = trace(A1' B1' B2 A2), the sum of (B1' B2) * (A1 A2'): nothing of size out x in is formed.
    a = module.lora_A.cpu().double().flatten(0, 1)
    b = module.lora_B.cpu().double().transpose(0, 1).flatten(1)
    products = ((a @ a.T) * (b.T @ b)).view(experts, rank, experts, rank).sum(dim=(1, 3))
    norms = products.diagonal().clamp(min=0).sqrt()
    norms = torch.where(norms > 0, norms, torch.nan)
    return (products / norms / norms[:, None]).clamp(-1, 1).numpy()


@dataclass
class ExpertUsage:
    """What the experts of a model did on some videos; made by [`expert_usage`].

    `sums`: module name -> source of tokens -> sums, for the modules that ran. `similarity`: module name -> similarity
    of its experts, see [`expert_similarity`].
    """

    sums: Mapping[str, Mapping[Source, RouterSums]]
    similarity: Mapping[str, np.ndarray]

    @property
    def modules(self) -> list[str]:
        """Names of the modules, in the order of the model."""
        return list(self.sums)

    @property
    def domains(self) -> list[str]:
        """Names of the videos' domains, in the order in which they came."""
        return list(dict.fromkeys(source.domain for parts in self.sums.values() for source in parts))

    def total(self, module: str, domain: str | None = None) -> RouterSums | None:
        """Sums over all tokens of a module, or those of a domain; None where it has none."""
        parts = [sums for source, sums in self.sums[module].items() if domain in (None, source.domain)]
        return RouterSums.total(parts) if parts else None

    def domain_usage(self, module: str) -> dict[str, np.ndarray]:
        """Mean gates (experts,) in each domain that the module ran in."""
        totals = {domain: self.total(module, domain) for domain in self.domains}
        return {domain: total.mean_gates for domain, total in totals.items() if total is not None}

    def to_pandas(self, by: str = "domain") -> pd.DataFrame:
        """Usage as a table with one row for each expert of each module.

        Args:
            by: "module" for all tokens together, "domain" or "object" for each domain or object apart.

        Returns:
            Columns `module`, `projection` (the last part of the module's name), `domain` (by domain and object),
            `video_id` and `object_id` (by object; no id where the module runs once for all objects), `expert`,
            `tokens`, `mean_gate` and `selection_frequency`.
        """
        if by not in ("module", "domain", "object"):
            raise ValueError(f"`by` must be 'module', 'domain' or 'object', got {by!r}.")
        tables = []
        for module, parts in self.sums.items():
            groups: dict[tuple, list[RouterSums]] = {}
            for source, sums in parts.items():
                key = {"module": (), "domain": (source.domain,), "object": tuple(source)}[by]
                groups.setdefault(key, []).append(sums)
            for key, group in groups.items():
                total = RouterSums.total(group)
                row = {"module": module, "projection": module.rpartition(".")[2]}
                row |= dict(zip(Source._fields, key, strict=False))
                values = {"tokens": total.tokens, "mean_gate": total.mean_gates, "selection_frequency": total.frequency}
                tables.append(pd.DataFrame(row | {"expert": range(len(total.gates))} | values))
        table = pd.concat(tables, ignore_index=True)
        if by == "object":
            table["object_id"] = table["object_id"].astype("Int64")
        return table

    def statistics(self, domain: str | None = None, dead_share: float = DEAD_SHARE) -> pd.DataFrame:
        """Figures of each module, over all tokens or those of a domain.

        Args:
            domain: one of `domains`.
            dead_share: experts chosen by a smaller share of the tokens are dead, and so are those never chosen.

        Returns:
            A row for each module, with
            - `usage_entropy`: of the mean gates, see [`normalized_entropy`]; low where few experts do the work;
            - `router_entropy`: mean over tokens, see [`RouterSums`]; low where the router is sure of its choice;
            - `load_cv`, `load_max`: standard deviation and maximum of the selection frequency, over its mean;
            - `load_balancing_loss`: of Switch Transformers, `num_experts_per_tok` at even load;
            - `domain_information`: [`mutual_information`] of domain and expert, in bits, and
              `domain_information_share`, as a share of log2(domains); 0 for one domain;
            - `mean_similarity`: of different experts, NaN where none can be compared;
            - `dead_experts`: a list of numbers.
        """
        if domain is not None and domain not in self.domains:
            raise ValueError(f"`domain` must be one of {self.domains}, got {domain!r}.")
        if not 0 <= dead_share <= 1:
            raise ValueError(f"`dead_share` must be from 0 to 1, got {dead_share!r}.")
        rows = {}
        for module in self.modules:
            total = self.total(module, domain)
            if total is None:
                continue
            usage = self.domain_usage(module) if domain is None else {domain: total.mean_gates}
            bits = mutual_information(np.stack(list(usage.values())))
            frequency = total.frequency
            rows[module] = {
                "tokens": total.tokens,
                "usage_entropy": normalized_entropy(total.gates),
                "router_entropy": total.router_entropy,
                "load_cv": float(frequency.std() / frequency.mean()),
                "load_max": float(frequency.max() / frequency.mean()),
                "load_balancing_loss": total.load_balancing_loss,
                "domain_information": bits,
                "domain_information_share": bits / np.log2(len(usage)) if len(usage) > 1 else 0.0,
                "mean_similarity": _mean_similarity(self.similarity[module]),
                "dead_experts": np.flatnonzero((frequency < dead_share) | (frequency == 0)).tolist(),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("module")

    def plot_usage(self) -> Figure:
        """Bars: mean gate weight of each expert, a panel for each projection, domains beside each other."""
        panels = {short_name(module): self.domain_usage(module) for module in self.modules}
        return plot_bars(panels, "mean gate weight", "Weight that routers give to each expert, by domain")

    def plot_heat_maps(self) -> Figure:
        """Heat maps, modules x experts: mean gate weight, domains beside each other."""
        return plot_heat_maps(
            {domain: self._usage_table(domain) for domain in self.domains},
            [short_name(module) for module in self.modules],
            f"mean gate weight (even use: {1 / self._num_experts:.2f})",
            "Weight that routers give to each expert",
        )

    def plot_domains(self) -> Figure:
        """Heat maps, modules x experts: by how much a domain's weights differ from the mean over all domains."""
        tables = {domain: self._usage_table(domain) for domain in self.domains}
        mean = np.nanmean(np.stack(list(tables.values())), axis=0)
        information = self.statistics()["domain_information"]
        return plot_heat_maps(
            {domain: table - mean for domain, table in tables.items()},
            [short_name(module) for module in self.modules],
            "mean gate weight minus its mean over domains",
            "Experts that a domain uses more, or less, than the others do",
            diverging=True,
            bars=("domain information\n(bits)", information.to_numpy(), np.log2(max(2, len(tables)))),
        )

    def plot_objects(self, module: str | None = None, max_objects: int = 40) -> Figure:
        """Heat map, objects x experts: mean gate weight in a module.

        Args:
            module: by default the last of [`image_modules`], or of all where there is none.
            max_objects: at most as many are drawn, the first ones.
        """
        module = module or (image_modules(self.modules) or self.modules)[-1]
        if module not in self.sums:
            raise ValueError(f"`module` must be one of {self.modules}, got {module!r}.")
        parts = list(self.sums[module].items())[:max_objects]
        names = [" ".join(str(part) for part in source if part is not None) for source, _ in parts]
        left_out = len(self.sums[module]) - len(parts)
        title = f"Weight of each expert by object\n(domain, video, object) in {short_name(module)}"
        return plot_heat_maps(
            {"": np.stack([sums.mean_gates for _, sums in parts])},
            names,
            f"mean gate weight (even use: {1 / self._num_experts:.2f})",
            title + (f"; {left_out} more not shown" if left_out else ""),
        )

    def plot_coactivation(self) -> Figure:
        """Matrices, experts x experts: share of the tokens that choose both."""
        matrices = {}
        for module in self.modules:
            matrix = self.total(module).coactivation
            matrices[short_name(module)] = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
        title = "Experts that are chosen together (the diagonal is left out)"
        return plot_matrices(matrices, "share of tokens that choose both", title)

    def plot_similarity(self) -> Figure:
        """Matrices, experts x experts: cosine similarity of the updates B A."""
        matrices = {short_name(module): self.similarity[module] for module in self.modules}
        title = "Similarity of what experts add to their layer (grey: an expert without effect)"
        return plot_matrices(matrices, "cosine similarity of B A", title, diverging=True)

    def save(self, folder: str | Path, dead_share: float = DEAD_SHARE) -> list[Path]:
        """Writes tables, figures and pictures into a folder, which is made if it is not there.

        Args:
            folder: where to write `usage.csv` and `usage_by_object.csv` ([`to_pandas`]), `statistics.json`
                ([`statistics`] of all and of each domain, co-activation and similarity) and PNGs of all `plot_*`;
                `domains.png` only for more than one domain.
            dead_share: see [`statistics`].

        Returns:
            The files.
        """
        figures = {
            "usage_bars.png": self.plot_usage(),
            "usage_heat_maps.png": self.plot_heat_maps(),
            "objects.png": self.plot_objects(),
            "coactivation.png": self.plot_coactivation(),
            "similarity.png": self.plot_similarity(),
        }
        if len(self.domains) > 1:
            figures["domains.png"] = self.plot_domains()
        statistics = json.dumps(self._report(dead_share), indent=1, allow_nan=False)
        tables = {"usage.csv": self.to_pandas(), "usage_by_object.csv": self.to_pandas("object")}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            table.to_csv(folder / name, index=False)
        (folder / "statistics.json").write_text(statistics + "\n")
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=120)
        return [folder / name for name in (*tables, "statistics.json", *figures)]

    @property
    def _num_experts(self) -> int:
        return max(len(sums.gates) for parts in self.sums.values() for sums in parts.values())

    def _usage_table(self, domain: str) -> np.ndarray:
        """Mean gates (modules, experts), NaN where a module did not run."""
        usage = [self.domain_usage(module).get(domain, np.empty(0)) for module in self.modules]
        missing = [self._num_experts - len(gates) for gates in usage]
        return np.stack([np.pad(g, (0, m), constant_values=np.nan) for g, m in zip(usage, missing, strict=True)])

    def _report(self, dead_share: float) -> dict:
        videos = {source[:2] for parts in self.sums.values() for source in parts}
        return {
            "domains": {name: {"videos": sum(domain == name for domain, _ in videos)} for name in self.domains},
            "dead_share": dead_share,
            "modules": _without_nan(self.statistics(None, dead_share)),
            "modules_by_domain": {domain: _without_nan(self.statistics(domain, dead_share)) for domain in self.domains},
            "coactivation": {module: self.total(module).coactivation.tolist() for module in self.modules},
            "similarity": {
                module: [[None if np.isnan(x) else float(x) for x in row] for row in self.similarity[module]]
                for module in self.modules
            },
        }


def _mean_similarity(similarity: np.ndarray) -> float:
    different = similarity[~np.eye(len(similarity), dtype=bool)]
    different = different[~np.isnan(different)]
    return float(different.mean()) if len(different) else float("nan")


def _without_nan(table: pd.DataFrame) -> dict[str, dict]:
    return {
        module: {name: None if value != value else value for name, value in row.items()}
        for module, row in table.to_dict(orient="index").items()
    }


def short_name(module: str) -> str:
    """A module's name for pictures: "layer 0 cross q" for the memory attention's, else its own."""
    match = re.fullmatch(r"memory_attention\.layers\.(\d+)\.(self|cross)_attn(?:_image)?\.([qkvo])_proj", module)
    return "layer {} {} {}".format(*match.groups()) if match else module


def expert_usage(
    model: SamoeModel,
    dataset: Iterable[Video] | datasets.Dataset | datasets.IterableDataset,
    processor: Sam2VideoProcessor | None = None,
    show_progress_bar: bool = True,
) -> ExpertUsage:
    """Tracks videos and notes what the routers choose.

    Each object is prompted with its mask on the first frame that shows it. Layers of the memory attention do not run on
    that frame, since nothing is remembered yet.

    Args:
        model: is left as it was.
        dataset: videos, such as a list or what `samoe_hf.data.load_videos` opens, or a dataset made by `to_datasets`.
        processor: that of the model; by default the one that fits its configuration.

    Raises:
        ValueError: for a dataset that holds anything but videos, or where no router ran.
    """
    processor = processor or build_processor(model.config)
    sums: dict[str, dict[Source, RouterSums]] = {name: {} for name, _ in expert_modules(model)}
    if not sums:
        raise ValueError("`model` has no layer with experts.")
    if isinstance(dataset, Video):
        raise ValueError("`dataset` must be several videos, got one; put it into a list.")
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        dataset = videos_from_dataset(dataset)

    def note(frame_idx: int, name: str, logits: Tensor, object_ids: list[int | None]) -> None:
        parts = RouterSums.of(logits, model.get_submodule(name).num_experts_per_tok)
        for object_id, part in zip(object_ids, parts, strict=True):
            source = Source(video.domain, video.video_id, object_id)
            sums[name][source] = RouterSums.total([sums[name][source], part]) if source in sums[name] else part

    with observe_routers(model, note):
        for video in tqdm(dataset, desc="experts", disable=not show_progress_bar):
            if not isinstance(video, Video):
                raise ValueError(
                    f"`dataset` must hold samoe_hf.data.Video, got an item of type {type(video).__name__}."
                )
            for _ in SimulatedUser(model, processor, video, EvaluationPrompt("mask")).track():
                pass
    sums = {name: parts for name, parts in sums.items() if parts}
    if not sums:
        raise ValueError(
            "No router ran: the videos of `dataset` have no objects, or no frames after the prompted ones."
        )
    similarity = {name: expert_similarity(module) for name, module in expert_modules(model)}
    return ExpertUsage(sums, {name: similarity[name] for name in sums})


@contextmanager
def observe_routers(model: SamoeModel, note: Callable[[int, str, Tensor, list[int | None]], None]) -> Iterator[None]:
    """While the context is open, the model is in evaluation mode and `note` is told of each router on each frame.

    Args:
        note: is called with the frame's index, the module's name, router logits (rows, ..., experts), and the object
            of each row. Of layers that run once for all objects, there is one row, with None as its object.
    """
    was_training = model.training
    with record_router_logits(model) as calls:

        def tell(_, args: tuple, kwargs: dict, output: Sam2VideoSegmentationOutput) -> None:
            session, t = args[0] if args else kwargs["inference_session"], output.frame_idx
            # Objects that are prompted on this frame read no memory.
            reading = [session.obj_idx_to_id(row) for row, on in session.frames_tracked_per_obj.items() if t in on]
            for name, logits_of_calls in calls.items():
                # Objects run in batches, but in the session's order.
                ids = iter(reading if name.startswith("memory_attention.") else output.object_ids)
                for logits in logits_of_calls:
                    if name.startswith(PARTS_BY_OBJECT):
                        note(t, name, logits, [next(ids) for _ in range(len(logits))])
                    else:
                        note(t, name, logits[None], [None])
                logits_of_calls.clear()

        handle = model.eval().register_forward_hook(tell, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            model.train(was_training)


def image_modules(modules: Iterable[str]) -> list[str]:
    """Those of the modules whose tokens are image positions; the last is the best one to look at.

    Of the memory attention these are `self_attn.*_proj`, `cross_attn_image.q_proj` and `o_proj`, of the vision encoder
    the MLPs. The last cross attention's queries, which ask the memory for each position, are put last.
    """
    found = [name for name in modules if IMAGE_PROJECTIONS.fullmatch(name) or IMAGE_LAYERS.fullmatch(name)]
    return sorted(found, key=lambda name: name.endswith("cross_attn_image.q_proj"))


def routing_module(model: SamoeModel, module: str | None = None) -> str | None:
    """The module to draw maps of: the given one, or else the last of [`image_modules`], or None if there is none.

    Raises:
        ValueError: if the given one is not among [`image_modules`].
    """
    allowed = image_modules(name for name, _ in expert_modules(model))
    if module is not None and module not in allowed:
        raise ValueError(
            f"`module` must be a layer with experts whose tokens are image positions, one of {allowed}, got {module!r}."
        )
    return module or (allowed[-1] if allowed else None)


@dataclass
class RoutingMaps:
    """Which expert has the largest gate at each image position of a video.

    `experts` (T, objects, h, w) int16, -1 on frames where the router did not run: before an object is seen and on the
    frame that it is prompted on. `object_ids`: of the objects, or [None] where the layer runs once for all of them.
    `masks` (T, video objects, H, W) bool: what was tracked meanwhile.
    """

    video: Video
    module: str
    num_experts: int
    object_ids: list[int | None]
    experts: np.ndarray
    masks: np.ndarray

    def save(self, path: str | Path, object_id: int | None = None, max_columns: int = 6) -> list[Path]:
        """Draws the maps of an object over the frames.

        Args:
            path: without suffix; a strip of frames is written as `.png`, the whole video as `.mp4`.
            object_id: by default the first.
            max_columns: frames in the strip, evenly spread over those with a map.

        Returns:
            Both files.
        """
        ids = self.object_ids
        if object_id is not None and ids != [None] and object_id not in ids:
            raise ValueError(f"`object_id` must be one of {ids}, got {object_id!r}.")
        column = ids.index(object_id) if object_id in ids else 0
        masks = self.masks[:, self.video.object_ids.index(ids[column])] if ids[column] else self.masks.any(axis=1)
        whose = f"object {ids[column]}" if ids[column] else "whole frame"
        video = " ".join(dict.fromkeys((self.video.domain, self.video.video_id)))
        title = f"Expert of largest weight in {short_name(self.module)}: {video}, {whose}"
        maps = self.experts[:, column]
        png, mp4 = (Path(f"{path}{suffix}") for suffix in (".png", ".mp4"))
        plot_routing(self.video.frames, masks, maps, self.num_experts, png, title, max_columns)
        write_video(
            mp4, routing_video(self.video.frames, masks, maps, self.num_experts, title), self.video.frames.fps or 6
        )
        return [png, mp4]


def routing_maps(
    model: SamoeModel, video: Video, processor: Sam2VideoProcessor | None = None, module: str | None = None
) -> RoutingMaps:
    """Tracks a video as [`expert_usage`] does and keeps the expert of each image position.

    Args:
        model: is left as it was.
        module: one of [`image_modules`], by default the last: the last cross attention's `q_proj`, where there is one.

    Raises:
        ValueError: for another module, or if the router never ran.
    """
    module = routing_module(model, module)
    if module is None:
        raise ValueError("`model` has no layer with experts whose tokens are image positions.")
    top: dict[tuple[int, int | None], np.ndarray] = {}

    def note(frame_idx: int, name: str, logits: Tensor, object_ids: list[int | None]) -> None:
        if name == module:
            size = logits.shape[-3:-1] if name.startswith("vision_encoder.") else model.backbone_feature_sizes[-1]
            experts = logits.argmax(dim=-1).reshape(len(logits), *size).to(torch.int16).cpu().numpy()
            top.update({(frame_idx, object_id): row for object_id, row in zip(object_ids, experts, strict=True)})

    with observe_routers(model, note):
        masks, _ = segment_video(model, processor or build_processor(model.config), video)
    if not top:
        raise ValueError(
            f"No router ran: video {video.video_id!r} has no objects, or no frames after the prompted ones."
        )
    of_frames = None in {object_id for _, object_id in top}
    object_ids = [None] if of_frames else [i for i in video.object_ids if i in {object_id for _, object_id in top}]
    size = next(iter(top.values())).shape
    maps = np.full((len(video), len(object_ids), *size), -1, dtype=np.int16)
    for (frame_idx, object_id), experts in top.items():
        maps[frame_idx, object_ids.index(object_id)] = experts
    return RoutingMaps(video, module, model.get_submodule(module).num_experts, object_ids, maps, masks)
