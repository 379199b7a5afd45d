"""How much each expert of a model is used: by layer, domain and object, as sums over tokens, tables and figures."""

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError
from samoe_hf.evaluation.simulated_user import PromptStrategy, SimulatedUser
from samoe_hf.evaluation.statistics import to_json
from samoe_hf.model.batch_rows import BatchRow
from samoe_hf.model.domain_experts import module_layer
from samoe_hf.model.expert_layer import ExpertMixture, expert_modules
from samoe_hf.model.expert_router import top_k_gates
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor, build_processor
from samoe_hf.model.weights_io import updated_folder
from samoe_hf.plots import experts as plots
from samoe_hf.plots.masks import plain_text

from .routing import image_modules, observe_routers, short_name

# An expert that a smaller share of the tokens chooses counts as dead.
DEAD_SHARE = 0.001
# Objects in the picture of objects.
MAX_OBJECTS = 40


class Source(NamedTuple):
    """What tokens come from. `object_id` is None where the tokens are of the frame and not of an object."""

    domain: str
    video_id: str
    object_id: int | None


By = Literal["module", "domain", "object"]
KEYS = {"module": (), "domain": ("domain",), "object": Source._fields}


@dataclass
class RouterSums:
    """What a router did, summed over tokens.

    Attributes:
        tokens: how many there are.
        gates: weights of the experts (experts,), which are 0 but for the top k of each token.
        entropy: of the probabilities of all experts, in nats.
        chosen: tokens that chose both experts (experts, experts); on the diagonal, those that chose the expert.
    """

    tokens: int
    gates: np.ndarray
    entropy: float
    chosen: np.ndarray

    @classmethod
    def from_logits(cls, router_logits: Tensor, num_experts_per_tok: int) -> list["RouterSums"]:
        """Sums for each row of logits (rows, ..., experts)."""
        logits = router_logits.detach().float()
        logits = logits.reshape(len(logits), -1, logits.shape[-1])
        gates = top_k_gates(logits, num_experts_per_tok).sum(dim=1)
        top = logits.topk(num_experts_per_tok, dim=-1).indices
        # Not `gates > 0`: the weight of a chosen expert may be too small to be told from 0.
        chosen = torch.zeros_like(logits).scatter(-1, top, 1.0)
        entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=(-2, -1))
        arrays = (x.cpu().double().numpy() for x in (gates, entropy, chosen.mT @ chosen))
        return [cls(logits.shape[1], g, float(e), c) for g, e, c in zip(*arrays, strict=True)]

    def __add__(self, other: "RouterSums") -> "RouterSums":
        return RouterSums(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def mean_gates(self) -> np.ndarray:
        """Mean weight of each expert (experts,), which add up to 1; the original's `get_expert_statistics`."""
        return self.gates / self.tokens

    @property
    def coactivation(self) -> np.ndarray:
        """Share of the tokens that choose both experts (experts, experts)."""
        return self.chosen / self.tokens

    @property
    def frequency(self) -> np.ndarray:
        """Share of the tokens that choose each expert (experts,); they add up to `num_experts_per_tok`."""
        return self.coactivation.diagonal()

    @property
    def router_entropy(self) -> float:
        """Mean entropy of a token's probabilities over all experts, 1 where the router does not decide."""
        return self.entropy / self.tokens / math.log(max(len(self.gates), 2))


def normalized_entropy(weights: np.ndarray) -> float:
    """Entropy of non-negative weights (experts,): from 0, one has all, to 1, all are equal; of a single expert 0."""
    return float(stats.entropy(weights)) / math.log(max(len(weights), 2))


def mutual_information(usage: np.ndarray) -> float:
    """Mutual information of domain and expert in bits, of each domain's mean gates (domains, experts).

    It is 0 when all domains use the experts alike (or there is one), and log2(domains) when no expert serves two.
    """
    bits = stats.entropy(usage.mean(axis=0), base=2) - stats.entropy(usage, base=2, axis=1).mean()
    return max(0.0, float(bits))


@torch.no_grad()
def expert_similarity(module: ExpertMixture) -> np.ndarray:
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

    Attributes:
        sums: module name -> source of tokens -> sums, for the modules that ran, in the order of the model.
        similarity: module name -> similarity of its experts, see [`expert_similarity`].
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
        return list(dict.fromkeys(source.domain for sources in self.sums.values() for source in sources))

    def totals(self, module: str, by: By = "module") -> dict[tuple, RouterSums]:
        """Sums over all tokens of a module under the key (), of each domain under (domain,), or of each [`Source`]."""
        groups: dict[tuple, RouterSums] = {}
        for source, sums in self.sums[module].items():
            key = source[: len(KEYS[by])]
            groups[key] = groups[key] + sums if key in groups else sums
        return groups

    def to_pandas(self, by: By = "domain") -> pd.DataFrame:
        """Usage as a table with one row for each expert of each module, in all, or of each "domain" or "object" apart.

        Returns:
            Columns `module`, `projection` (the last part of the module's name), `domain` (by domain and object),
            `video_id` and `object_id` (by object; no id where the module runs once for all objects), `expert`,
            `tokens`, `mean_gate` and `selection_frequency`.
        """
        if by not in KEYS:
            raise InputError(f"`by` must be 'module', 'domain' or 'object', got {by!r}.")
        rows = []
        for module in self.modules:
            place = {"module": module, "projection": module.rpartition(".")[2]}
            for key, sums in self.totals(module, by).items():
                source = dict(zip(KEYS[by], key, strict=True))
                for expert, (gate, chosen) in enumerate(zip(sums.mean_gates, sums.frequency, strict=True)):
                    figures = {"tokens": sums.tokens, "mean_gate": gate, "selection_frequency": chosen}
                    rows.append({**place, **source, "expert": expert, **figures})
        table = pd.DataFrame(rows)
        return table.astype({"object_id": "Int64"}) if by == "object" else table

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
            - `domain_information`: [`mutual_information`] of domain and expert, in bits; 0 for one domain;
            - `mean_similarity`: of different experts, NaN where none can be compared;
            - `dead_experts`: a list of numbers.
        """
        if domain is not None and domain not in self.domains:
            raise InputError(f"`domain` must be one of {self.domains}, got {domain!r}.")
        if not 0 <= dead_share <= 1:
            raise InputError(f"`dead_share` must be from 0 to 1, got {dead_share!r}.")
        rows = {}
        for module in self.modules:
            totals = self.totals(module, "domain")
            totals = totals if domain is None else {key: sums for key, sums in totals.items() if key == (domain,)}
            if not totals:
                continue
            total = functools.reduce(operator.add, totals.values())
            frequency = total.frequency
            similarity = pd.Series(self.similarity[module][~np.eye(len(frequency), dtype=bool)])
            rows[module] = {
                "tokens": total.tokens,
                "usage_entropy": normalized_entropy(total.gates),
                "router_entropy": total.router_entropy,
                "load_cv": float(frequency.std() / frequency.mean()),
                "load_max": float(frequency.max() / frequency.mean()),
                "domain_information": mutual_information(np.stack([sums.mean_gates for sums in totals.values()])),
                "mean_similarity": float(similarity.mean()),  # without NaN
                "dead_experts": np.flatnonzero((frequency < dead_share) | (frequency == 0)).tolist(),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("module")

    def plot(self, kind: str) -> Figure:
        """Draws what the experts did, all layers in one picture.

        Args:
            kind: one of
                - "usage_bars", "usage_heat_maps": mean gate weight of each expert, domains beside each other;
                - "domains": by how much a domain's weights differ from the mean over all domains;
                - "objects": mean gate weight by object, in the last of [`image_modules`], or of all if there is none;
                - "coactivation": share of the tokens that choose both of two experts;
                - "similarity": cosine similarity of the updates B A of two experts.
        """
        if kind not in PLOTS:
            raise InputError(f"`kind` must be one of {', '.join(PLOTS)}, got {kind!r}.")
        names = {module: short_name(module) for module in self.modules}
        if kind == "objects":
            layers = image_modules(self.modules)
            module = next((m for m in self.modules if layers and module_layer(m) == layers[-1]), self.modules[-1])
            objects = [" ".join(str(part) for part in source if part is not None) for source in self.sums[module]]
            gates = np.stack([sums.mean_gates for sums in self.sums[module].values()][:MAX_OBJECTS])
            title = f"Weight of each expert by object\n(domain, video, object) in {names[module]}"
            title += f"; {len(objects) - MAX_OBJECTS} more not shown" if len(objects) > MAX_OBJECTS else ""
            return plots.plot_heat_maps({"": gates}, objects[:MAX_OBJECTS], _weight_label(gates), title)
        if kind == "coactivation":
            title = "Experts that are chosen together (the diagonal is left out)"
            chosen = {names[module]: self.totals(module)[()].coactivation for module in self.modules}
            chosen = {name: np.where(np.eye(len(matrix)) == 1, np.nan, matrix) for name, matrix in chosen.items()}
            return plots.plot_matrices(chosen, "share of tokens that choose both", title)
        if kind == "similarity":
            title = "Similarity of what experts add to their layer (grey: an expert without effect)"
            similarity = {names[module]: self.similarity[module] for module in self.modules}
            return plots.plot_matrices(similarity, "cosine similarity of B A", title, diverging=True)
        title = "Weight that routers give to each expert"
        usage = {
            names[module]: {domain: sums.mean_gates for (domain,), sums in self.totals(module, "domain").items()}
            for module in self.modules
        }
        if kind == "usage_bars":
            return plots.plot_bars(usage, "mean gate weight", f"{title}, by domain")
        tables = plots.tables_by_domain(usage)
        stacked = np.stack(list(tables.values()))
        if kind == "usage_heat_maps":
            return plots.plot_heat_maps(tables, list(usage), _weight_label(stacked), title)
        # Not `nanmean`, which warns of experts that a layer does not have.
        mean = np.ma.masked_invalid(stacked).mean(axis=0).filled(np.nan)
        information = self.statistics()["domain_information"].to_numpy()
        return plots.plot_heat_maps(
            {domain: table - mean for domain, table in tables.items()},
            list(usage),
            "mean gate weight minus its mean over domains",
            "Experts that a domain uses more, or less, than the others do",
            diverging=True,
            bars=("domain information\n(bits)", information, np.log2(max(2, len(tables)))),
        )

    def save(self, folder: str | Path, dead_share: float = DEAD_SHARE) -> list[Path]:
        """Writes `usage.csv`, `usage_by_object.csv` ([`to_pandas`]), `statistics.json` ([`statistics`] of all and of
        each domain, co-activation and similarity) and a PNG of each [`plot`] into a folder, all or none; returns them.

        `domains.png` is only made of more than one domain.
        """
        figures = {f"{kind}.png": self.plot(kind) for kind in PLOTS if kind != "domains" or len(self.domains) > 1}
        videos = {source[:2] for sources in self.sums.values() for source in sources}
        report = {
            "domains": {name: {"videos": sum(domain == name for domain, _ in videos)} for name in self.domains},
            "dead_share": dead_share,
            "modules": self.statistics(None, dead_share).to_dict("index"),
            "modules_by_domain": {d: self.statistics(d, dead_share).to_dict("index") for d in self.domains},
            "coactivation": {module: self.totals(module)[()].coactivation.tolist() for module in self.modules},
            "similarity": {module: self.similarity[module].tolist() for module in self.modules},
        }
        tables = {"usage.csv": self.to_pandas(), "usage_by_object.csv": self.to_pandas("object")}
        with updated_folder(folder) as temporary:
            for name, table in tables.items():
                table.to_csv(temporary / name, index=False)
            (temporary / "statistics.json").write_text(to_json(report) + "\n", encoding="utf-8")
            for name, figure in figures.items():
                plain_text(figure.savefig)(temporary / name, dpi=120)
        return [Path(folder) / name for name in (*tables, "statistics.json", *figures)]


PLOTS = ("usage_bars", "usage_heat_maps", "objects", "coactivation", "similarity", "domains")


def _weight_label(gates: np.ndarray) -> str:
    return f"mean gate weight (even use: {1 / gates.shape[-1]:.2f})"


def expert_usage(
    model: SamoeModel, videos: Iterable[Video], processor: VideoProcessor | None = None, show_progress_bar: bool = True
) -> ExpertUsage:
    """Tracks videos and sums up what the routers choose.

    Each object is prompted with its mask on the first frame that shows it. Layers of the memory attention do not run on
    that frame, since nothing is remembered yet. Layers that run once for all objects count once for each frame.

    Only sums over tokens are kept. The processor is by default the one that fits the model's configuration.

    Raises:
        InputError: if something else than a video is among them, or no router ran.
    """
    processor = processor or build_processor(model.config)
    modules = dict(expert_modules(model))
    sums: dict[str, dict[Source, RouterSums]] = {name: {} for name in modules}
    counted_frames: set[tuple[str, int]] = set()  # of one video, by modules that run once for all objects

    def add(name: str, rows: Sequence[BatchRow], logits: Tensor) -> None:
        parts = RouterSums.from_logits(logits, modules[name].num_experts_per_tok)
        for (_, frame_idx, object_id), part in zip(rows, parts, strict=True):
            if object_id is None:
                if (name, frame_idx) in counted_frames:
                    continue
                counted_frames.add((name, frame_idx))
            source = Source(video.domain, video.video_id, object_id)
            sums[name][source] = sums[name][source] + part if source in sums[name] else part

    with observe_routers(model, add):
        for video in tqdm(videos, desc="experts", disable=not show_progress_bar):
            if not isinstance(video, Video):
                raise InputError(f"`videos` must hold samoe_hf.data.Video, got a {type(video).__name__}.")
            counted_frames.clear()
            for _ in SimulatedUser(model, processor, video, PromptStrategy("mask")).track():
                pass
    sums = {name: sources for name, sources in sums.items() if sources}
    if not sums:
        raise InputError(
            "No router ran: the model has no experts, or the `videos` have no objects, no frames after the "
            "prompted ones, or belong to no domain of the model."
        )
    return ExpertUsage(sums, {name: expert_similarity(modules[name]) for name in sums})
