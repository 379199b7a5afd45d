"""LoRAs that were trained apart, each on its domain, become the experts of one model, with routers that tell domains.

Routers are not trained but computed: linear discriminant analysis on what each router reads in each domain.
"""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Sam2VideoProcessor

from .data.schema import Video
from .experts import expert_modules, route_all_to
from .inference import VideoPrompt, load_processor, track_video
from .lora_exchange import expert_tensors, read_lora
from .modeling_samoe import SamoeModel
from .surgery import replace_experts

# Frames of a video that are tracked to see a domain: more videos tell more of it than long ones.
FRAMES_PER_VIDEO = 8
# Tokens of one call of a layer that count; neighbours are much alike.
TOKENS_PER_CALL = 1024
# Share of its diagonal in the covariance.
SHRINKAGE = 1e-3


def assemble(
    base: str | os.PathLike,
    loras: Mapping[str, str | os.PathLike | None],
    videos: Mapping[str, Iterable[Video]],
    *,
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
        num_experts_per_tok: experts that a token goes to; with 1, each LoRA has its whole effect.
        num_frames: frames of each domain that the routers are computed from.
        device: where the model is put and run.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: if the base's experts have an effect, a LoRA cannot be an expert (see `add_expert`) or does not fit
            the base, or a domain has no videos.
    """
    if missing := [domain for domain in loras if domain not in videos]:
        raise ValueError(f"`videos` has none of the domain {missing[0]!r}; there are {', '.join(map(repr, videos))}.")
    read = {domain: None if source is None else read_lora(source) for domain, source in loras.items()}
    layers = [(name, *layer) for lora in read.values() if lora is not None for name, layer in lora.layers.items()]
    if not layers:
        raise ValueError("`loras` must hold at least one LoRA.")
    names = {name for name, *_ in layers}
    model = SamoeModel.from_pretrained(base, **kwargs).to(device)
    if with_effect := [name for name, module in expert_modules(model) if module.lora_B.any()]:
        raise ValueError(
            f"{base} has experts with an effect, such as those of {with_effect[0]!r}, which would be lost."
        )
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if others := sorted(names - linear):
        raise ValueError(f"`loras` have a layer {others[0]!r}, which {base} does not have.")
    rank = max(len(A) for _, A, _, _ in layers)
    replace_experts(
        model,
        expert_modules=[name for name, _ in model.named_modules() if name in names],
        num_experts=len(loras),
        num_experts_per_tok=num_experts_per_tok,
        lora_rank=rank,
        # The scale of the first; where all have the same, their B stay as they are.
        lora_alpha=layers[0][3] * rank,
        lora_dropout=0.0,
    )
    for expert, lora in enumerate(read.values()):
        if lora is not None:
            tensors = expert_tensors(model, lora)
            for name, module in expert_modules(model):
                module.lora_A.data[expert], module.lora_B.data[expert] = (x[0] for x in tensors[name])
    processor = load_processor(base, model)
    fit_routers(model, processor, [videos[domain] for domain in loras], num_frames, show_progress_bar)
    return model


@torch.no_grad()
def fit_routers(
    model: SamoeModel,
    processor: Sam2VideoProcessor,
    videos: Sequence[Iterable[Video]],
    num_frames: int = 200,
    show_progress_bar: bool = True,
) -> None:
    """Sets all routers so that the tokens of each expert's domain go to that expert.

    For each layer, `logit_e = w_e x + b_e` is the linear discriminant of what the layer reads in the domains:
    `w_e = S^-1 m_e`, `b_e = -m_e w_e / 2`, where `m_e` is the mean of the domain and S the covariance within domains.
    First each domain is tracked with its expert alone, then once more as the routers send it, since a token that goes
    astray changes what later layers read. Where domains look the same to a layer no router can help; see
    [`routed_right`].

    Args:
        videos: of each expert's domain, in the order of the experts, with masks. A sequence is sampled evenly.
        num_frames: frames that are tracked of each domain, twice, a few of each video.

    Raises:
        ValueError: if there are not as many domains as experts, or one has no annotated video.
    """
    if len(videos) != model.config.num_experts:
        raise ValueError(
            f"`videos` must be of {model.config.num_experts} domains, one for each expert, got {len(videos)}."
        )
    for forced in (True, False):
        moments = {name: _Moments(len(videos), module.in_features) for name, module in expert_modules(model)}
        for expert, of_domain in enumerate(videos):
            description = f"domain {expert + 1}/{len(videos)}, {'own expert' if forced else 'as routed'}"
            with (
                route_all_to(model, expert) if forced else nullcontext(),
                _watch(model, partial(_add, moments, expert)),
            ):
                _track(model, processor, of_domain, num_frames, description, show_progress_bar)
        _set_routers(model, moments)


def _add(moments: Mapping[str, "_Moments"], domain: int, name: str, hidden_states: Tensor) -> None:
    moments[name].add(domain, _not_padding(hidden_states))


def _set_routers(model: SamoeModel, moments: Mapping[str, "_Moments"]) -> None:
    """The routers as linear discriminants of the domains."""
    for name, module in expert_modules(model):
        if not moments[name].counts.all():
            continue  # the layer was not run
        means, covariance = moments[name].means, moments[name].covariance
        # Shrunk toward its diagonal, which keeps directions of little variance; what never varies gets a floor.
        covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.diag().diag()
        covariance.diagonal().add_((1e-6 * covariance.diagonal().mean()).clamp(min=1e-12))
        weight = torch.linalg.solve(covariance, means.T).T
        bias = -(weight * means).sum(dim=1) / 2
        # What is common to all experts changes no routing, but may be large.
        module.router.weight.copy_(weight - weight.mean(dim=0))
        module.router.bias.copy_(bias - bias.mean())


@torch.no_grad()
def routed_right(
    model: SamoeModel,
    processor: Sam2VideoProcessor,
    videos: Sequence[Iterable[Video]],
    num_frames: int = 50,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """How much of the gates' weight goes to each domain's own expert while its videos are tracked.

    Returns:
        name of each layer with experts that was run -> (experts,), 0 to 1.
    """
    modules = dict(expert_modules(model))
    sums = {name: torch.zeros(len(videos), dtype=torch.float64) for name in modules}
    counts = {name: torch.zeros(len(videos), dtype=torch.float64) for name in modules}
    for expert, of_domain in enumerate(videos):

        def see(name: str, hidden_states: Tensor, expert: int = expert) -> None:
            module, tokens = modules[name], _not_padding(hidden_states)
            logits = F.linear(tokens, module.router.weight, module.router.bias)
            sums[name][expert] += module.gates(logits)[:, expert].double().sum().cpu()
            counts[name][expert] += len(tokens)

        with _watch(model, see):
            _track(model, processor, of_domain, num_frames, f"routing {expert + 1}/{len(videos)}", show_progress_bar)
    return {name: sums[name] / counts[name] for name in modules if counts[name].all()}


def _not_padding(hidden_states: Tensor) -> Tensor:
    """Tokens (tokens, features) without those that are zero, such as the padding of windows: no expert affects them."""
    tokens = hidden_states.flatten(0, -2)
    return tokens[tokens.any(dim=1)]


class _Moments:
    """Means (domains, features) and covariance within domains (features, features) of tokens that come in parts."""

    def __init__(self, domains: int, features: int):
        self.counts = torch.zeros(domains, 1, dtype=torch.float64)
        self.sums = torch.zeros(domains, features, dtype=torch.float64)
        self.products = torch.zeros(features, features, dtype=torch.float64)

    def add(self, domain: int, tokens: Tensor) -> None:
        tokens = tokens[:: 1 + len(tokens) // TOKENS_PER_CALL].double().cpu()
        self.counts[domain] += len(tokens)
        self.sums[domain] += tokens.sum(dim=0)
        self.products += tokens.T @ tokens

    @property
    def means(self) -> Tensor:
        return self.sums / self.counts

    @property
    def covariance(self) -> Tensor:
        return (self.products - self.sums.T @ self.means) / self.counts.sum()


@contextmanager
def _watch(model: SamoeModel, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the context is open, `see` gets the name of each layer that is run and what its router reads."""
    handles = [
        module.router.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
        for name, module in expert_modules(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _track(
    model: SamoeModel,
    processor: Sam2VideoProcessor,
    videos: Iterable[Video],
    num_frames: int,
    description: str,
    show_progress_bar: bool,
) -> None:
    """Tracks the first frames of videos, from the masks of the first that shows an object, `num_frames` in all."""
    was_training = model.training
    model.eval()
    order = videos
    if hasattr(videos, "__getitem__"):
        order = (videos[i] for i in random.Random(0).sample(range(len(videos)), len(videos)))
    left = num_frames
    with tqdm(total=num_frames, desc=description, unit="frame", disable=not show_progress_bar) as progress:
        for video in order:
            start = next((t for t in video.annotated_frames if video.visible(t)), None)
            if start is None:
                continue
            frames = list(islice((video.frames[t] for t in range(start, len(video))), min(FRAMES_PER_VIDEO, left)))
            ids = video.visible(start)
            prompts = [VideoPrompt(i, mask=mask) for i, mask in zip(ids, video.masks(start, ids), strict=True)]
            for _ in track_video(model, processor, frames, prompts):
                progress.update()
            left -= len(frames)
            if left <= 0:
                break
    model.train(was_training)
    if left == num_frames:
        raise ValueError(f"`videos`: {description} has no video with an object.")
