"""LoRAs that were trained apart, each on its domain, become one model.

[`assemble_domains`] makes a domain of each, whose videos the gate recognizes. [`assemble`] makes experts of them that
all videos share, under routers that choose for each token. Those are not trained but computed: mixture discriminant
analysis (Hastie and Tibshirani, 1996) of what each router reads in each domain.
"""

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import ProcessorMixin

from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt, evaluation_mode, track_video
from samoe_hf.model.expert_layer import expert_modules, open_hooks, route_all_to
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import load_processor
from samoe_hf.surgery.domains import add_domain
from samoe_hf.surgery.experts import replace_experts
from samoe_hf.surgery.loras import Lora, add_lora_domain, expert_tensors, read_lora

from .fit_gate import first_visible, fit_gate

# Frames of a video that are tracked to see a domain: more videos tell more of it than long ones.
FRAMES_PER_VIDEO = 8
# Tokens of a domain that are kept for each layer.
TOKENS_PER_DOMAIN = 4096
# Rounds of clustering, each with the covariance that the one before found, and steps of each.
ROUNDS, STEPS = 2, 10


def assemble(
    base: str | os.PathLike,
    loras: Mapping[str, str | os.PathLike | None],
    videos: Mapping[str, Iterable[Video]],
    *,
    experts_per_lora: int = 6,
    num_experts_per_tok: int = 1,
    num_frames: int = 200,
    show_progress_bar: bool = True,
    device: str | torch.device | None = None,
    **kwargs,
) -> SamoeModel:
    """Makes a model whose experts are LoRAs of PEFT, each for one domain.

    Its `lora_rank` is the highest of the LoRAs', its layers with experts are all that any of them has.

    Args:
        base: the model that the LoRAs were trained on, as `SamoeModel.from_pretrained` takes it; experts that it has
            must be without effect, since the new ones take their place.
        loras: domain -> folder or Hub id of a LoRA, in the order of the experts; None for a domain on which the base is
            good as it is.
        videos: domain -> videos with masks; see [`fit_routers`].
        experts_per_lora: how many experts each LoRA becomes, equal but for their router rows: as many kinds of tokens
            as a domain can have. The experts of the first LoRA come first, then those of the second, and so on.
        num_experts_per_tok: experts that a token goes to; with 1, each LoRA has its whole effect.
        num_frames: frames of each domain that the routers are computed from.
        device: where the model is put and run.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: if the base's experts have an effect, a LoRA cannot be an expert (see `add_expert`) or does not fit
            the base, or a domain has no videos.
    """
    if missing := [domain for domain in loras if domain not in videos]:
        raise InputError(f"`videos` has none of the domain {missing[0]!r}; there are {', '.join(map(repr, videos))}.")
    read = {domain: None if source is None else read_lora(source) for domain, source in loras.items()}
    if not any(lora is not None and lora.layers for lora in read.values()):
        raise InputError("`loras` must hold at least one LoRA.")
    model = SamoeModel.from_pretrained(base, **kwargs).to(device)
    _check_base(model, base, read)
    _replace_by_loras(model, list(read.values()), experts_per_lora, num_experts_per_tok)
    processor = load_processor(base, model)
    fit_routers(model, processor, [videos[domain] for domain in loras], num_frames, show_progress_bar)
    return model


def assemble_domains(
    base: str | os.PathLike,
    loras: Mapping[str, str | os.PathLike | None],
    videos: Mapping[str, Sequence[Video]],
    *,
    show_progress_bar: bool = True,
    device: str | torch.device | None = None,
    **kwargs,
) -> SamoeModel:
    """Makes a model with a domain for each LoRA of PEFT; a video that the gate gives to it gets the LoRA's output.

    Args:
        base: the model that the LoRAs were trained on, as `SamoeModel.from_pretrained` takes it. It may have domains;
            experts that belong to none must be without effect.
        loras: domain -> folder or Hub id of a LoRA; None for a domain on which the base is good as it is.
        videos: domain -> videos with masks, from which the gate learns to recognize it.
        device: where the model is put and run.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: if a domain has no videos, or cannot be added; see [`~SamoeModel.add_lora_domain`].
    """
    if missing := [domain for domain in loras if domain not in videos]:
        raise InputError(f"`videos` has none of the domain {missing[0]!r}; there are {', '.join(map(repr, videos))}.")
    model = SamoeModel.from_pretrained(base, **kwargs).to(device)
    processor = load_processor(base, model)
    for domain, source in loras.items():
        if source is None:
            add_domain(model, domain, num_experts=0)
        else:
            add_lora_domain(model, domain, source)
        fit_gate(model, processor, domain, videos[domain], show_progress_bar)
    return model


def _check_base(model: SamoeModel, base: str | os.PathLike, loras: Mapping[str, Lora | None]) -> None:
    """ValueError if experts of the base have an effect, or it lacks a layer of the LoRAs."""
    if with_effect := [name for name, module in expert_modules(model) if module.lora_B.any()]:
        raise InputError(
            f"{base} has experts with an effect, such as those of {with_effect[0]!r}, which would be lost."
        )
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if others := sorted({name for lora in loras.values() if lora is not None for name in lora.layers} - linear):
        raise InputError(f"`loras` have a layer {others[0]!r}, which {base} does not have.")


def _replace_by_loras(
    model: SamoeModel, loras: Sequence[Lora | None], experts_per_lora: int, num_experts_per_tok: int
) -> None:
    """Replaces the model's experts by those of the LoRAs, `experts_per_lora` equal ones of each, in order."""
    layers = [(name, *layer) for lora in loras if lora is not None for name, layer in lora.layers.items()]
    names, rank = {name for name, *_ in layers}, max(len(A) for _, A, _, _ in layers)
    replace_experts(
        model,
        expert_modules=[name for name, _ in model.named_modules() if name in names],
        num_experts=experts_per_lora * len(loras),
        num_experts_per_tok=num_experts_per_tok,
        lora_rank=rank,
        # The scale of the first; where all have the same, their B stay as they are.
        lora_alpha=layers[0][3] * rank,
        lora_dropout=0.0,
    )
    for number, lora in enumerate(loras):
        if lora is not None:
            tensors = expert_tensors(model, lora)
            experts = slice(number * experts_per_lora, (number + 1) * experts_per_lora)
            for name, module in expert_modules(model):
                module.lora_A.data[experts], module.lora_B.data[experts] = tensors[name]


@torch.no_grad()
def fit_routers(
    model: SamoeModel,
    processor: ProcessorMixin,
    videos: Sequence[Iterable[Video]],
    num_frames: int = 200,
    show_progress_bar: bool = True,
) -> None:
    """Sets all routers so that the tokens of each domain go to its experts, which are as many for each.

    For each layer, `logit_e = w_e x + b_e` is the linear discriminant of what the layer reads: `w_e = S^-1 m_e`,
    `b_e = -m_e w_e / 2`. A domain's tokens are clustered, one cluster for each of its experts; `m_e` is its mean and S
    the covariance within clusters. First each domain is tracked with its first expert alone, then once more as
    the routers send it, since a token that goes astray changes what later layers read. Where domains look the same to a
    layer no router can help; see [`routed_right`].

    Args:
        videos: of each domain, in the order of the experts, with masks. A sequence is sampled evenly.
        num_frames: frames that are tracked of each domain, twice, a few of each video.

    Raises:
        ValueError: if there are not as many domains as experts, or one has no annotated video.
    """
    per_domain = _experts_per_domain(model, videos)
    for forced in (True, False):
        tokens: dict[str, list[list[Tensor]]] = {name: [[] for _ in videos] for name, _ in expert_modules(model)}
        for domain, domain_videos in enumerate(videos):
            description = f"domain {domain + 1}/{len(videos)}, {'own expert' if forced else 'as routed'}"
            store = partial(_store_tokens, tokens, domain, math.ceil(TOKENS_PER_DOMAIN / num_frames))
            with route_all_to(model, domain * per_domain) if forced else nullcontext(), _observe_inputs(model, store):
                _track(model, processor, domain_videos, num_frames, description, show_progress_bar)
        for name, module in expert_modules(model):
            if all(tokens[name]):  # else the layer was not run
                weight, bias = _discriminants([torch.cat(parts).double() for parts in tokens[name]], per_domain)
                module.router.weight.copy_(weight)
                module.router.bias.copy_(bias)


def _experts_per_domain(model: SamoeModel, videos: Sequence[Iterable[Video]]) -> int:
    num_experts = model.config.num_experts
    if not videos or num_experts % len(videos):
        raise InputError(f"`videos` must be of as many domains as {num_experts} experts can share, got {len(videos)}.")
    return num_experts // len(videos)


def _store_tokens(
    tokens: dict[str, list[list[Tensor]]], domain: int, max_tokens: int, name: str, hidden_states: Tensor
) -> None:
    """Stores up to `max_tokens` tokens of a call, evenly drawn."""
    read = _without_padding(hidden_states)
    if len(read):
        tokens[name][domain].append(read[_even_indices(len(read), min(max_tokens, len(read)))].cpu())


def _discriminants(domains: Sequence[Tensor], per_domain: int) -> tuple[Tensor, Tensor]:
    """Weight (domains * per_domain, features) and bias of the routers for each domain's tokens (tokens, features)."""
    centers, residuals = [x[_even_indices(len(x), per_domain)] for x in domains], [x - x.mean(dim=0) for x in domains]
    for _ in range(ROUNDS):
        covariance = _shrunk(torch.stack([r.T @ r / len(r) for r in residuals]).mean(dim=0), sum(map(len, domains)))
        # Clusters are told apart as the discriminants do.
        whiten = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
        for i, x in enumerate(domains):
            clusters = _cluster(x @ whiten, centers[i] @ whiten)
            centers[i] = _means(x, clusters, centers[i])
            residuals[i] = x - centers[i][clusters]
    covariance = _shrunk(torch.stack([r.T @ r / len(r) for r in residuals]).mean(dim=0), sum(map(len, domains)))
    means = torch.cat(centers)
    weight = torch.linalg.solve(covariance, means.T).T
    bias = -(weight * means).sum(dim=1) / 2
    # What is common to all experts changes no routing, but may be large.
    return weight - weight.mean(dim=0), bias - bias.mean()


def _even_indices(count: int, num: int) -> Tensor:
    """Indices (num,), evenly distributed over `count`."""
    return torch.linspace(0, count - 1, num).long()


def _shrunk(covariance: Tensor, count: int) -> Tensor:
    """Shrunk toward its diagonal, the more the fewer tokens it is of; what never varies gets a floor."""
    diagonal = covariance.diagonal()
    share = len(covariance) / (len(covariance) + count)
    floor = (1e-6 * diagonal.mean()).clamp(min=1e-12)
    return (1 - share) * covariance + (share * diagonal + floor).diag()


def _cluster(x: Tensor, centers: Tensor) -> Tensor:
    """k-means from given centers (clusters, features): the cluster of each token (tokens,)."""
    for _ in range(STEPS):
        nearest = torch.cdist(x, centers).argmin(dim=1)
        centers = _means(x, nearest, centers)
    return nearest


def _means(x: Tensor, clusters: Tensor, centers: Tensor) -> Tensor:
    """Mean of each cluster's tokens; of an empty one, its old center."""
    counts = torch.bincount(clusters, minlength=len(centers))[:, None]
    sums = torch.zeros_like(centers).index_add_(0, clusters, x)
    return torch.where(counts > 0, sums / counts.clamp(min=1), centers)


@torch.no_grad()
def routed_right(
    model: SamoeModel,
    processor: ProcessorMixin,
    videos: Sequence[Iterable[Video]],
    num_frames: int = 50,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """How much of the gates' weight goes to each domain's own experts while its videos are tracked.

    Returns:
        name of each layer with experts that was run -> (domains,), 0 to 1.
    """
    per_domain = _experts_per_domain(model, videos)
    modules = dict(expert_modules(model))
    sums = {name: torch.zeros(len(videos), dtype=torch.float64) for name in modules}
    counts = {name: torch.zeros(len(videos), dtype=torch.float64) for name in modules}
    for domain, domain_videos in enumerate(videos):
        own = slice(domain * per_domain, (domain + 1) * per_domain)

        def add(name: str, hidden_states: Tensor, domain: int = domain, own: slice = own) -> None:
            module, tokens = modules[name], _without_padding(hidden_states)
            logits = F.linear(tokens, module.router.weight, module.router.bias)
            sums[name][domain] += module.gates(logits)[:, own].double().sum().cpu()
            counts[name][domain] += len(tokens)

        with _observe_inputs(model, add):
            _track(
                model, processor, domain_videos, num_frames, f"routing {domain + 1}/{len(videos)}", show_progress_bar
            )
    return {name: sums[name] / counts[name] for name in modules if counts[name].all()}


def _without_padding(hidden_states: Tensor) -> Tensor:
    """Tokens (tokens, features) without those that are zero, such as the padding of windows: no expert affects them."""
    tokens = hidden_states.flatten(0, -2)
    return tokens[tokens.any(dim=1)]


@contextmanager
def _observe_inputs(model: SamoeModel, observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the context is open, `observe` gets the name of each layer that is run and what its router reads."""
    hooks = (
        module.register_forward_pre_hook(lambda _, inputs, name=name: observe(name, inputs[0]))
        for name, module in expert_modules(model)
    )
    with open_hooks(hooks):
        yield


def _track(
    model: SamoeModel,
    processor: ProcessorMixin,
    videos: Iterable[Video],
    num_frames: int,
    description: str,
    show_progress_bar: bool,
) -> None:
    """Tracks the first frames of videos, from the masks of the first that shows an object, `num_frames` in all."""
    order = videos
    if hasattr(videos, "__getitem__"):
        order = (videos[i] for i in random.Random(0).sample(range(len(videos)), len(videos)))
    num_left = num_frames
    progress = tqdm(total=num_frames, desc=description, unit="frame", disable=not show_progress_bar)
    with evaluation_mode(model), progress:
        for video in order:
            start = first_visible(video)
            if start is None:
                continue
            frames = [video.frames[t] for t in range(start, min(start + min(FRAMES_PER_VIDEO, num_left), len(video)))]
            ids = video.visible(start)
            prompts = [VideoPrompt(i, mask=mask) for i, mask in zip(ids, video.masks(start, ids), strict=True)]
            for _ in track_video(model, processor, frames, prompts):
                progress.update()
            num_left -= len(frames)
            if num_left <= 0:
                break
    if num_left == num_frames:
        raise InputError(f"`videos`: {description} has no video with an object.")
