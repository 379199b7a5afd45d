"""One mixture of experts of LoRAs that were trained apart, under routers that are computed, not trained.

    python scripts/study/token_routers.py BASE blobs=LORA_A stripes=LORA_B --dataset RUN.yaml --output DIR

The experts belong to all videos, and a router chooses for each token. It is a linear discriminant of what its layer
reads in each domain, with several clusters for each (mixture discriminant analysis; Hastie, Tibshirani 1996). BASE,
LoRAs and datasets are as for `samoe assemble`.
"""

import argparse
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import ProcessorMixin

from samoe_hf.analysis.routing import route_all_to
from samoe_hf.commands.assemble import match_domains
from samoe_hf.commands.options import add_device_option
from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt, evaluation_mode, load_processor, track_video
from samoe_hf.model.expert_layer import expert_modules
from samoe_hf.model.expert_router import open_hooks
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.surgery.experts import replace_experts
from samoe_hf.surgery.loras import expert_tensors, read_lora
from samoe_hf.whole_files import new_folder

# Frames of a video that are tracked to see a domain: more videos tell more of it than long ones.
FRAMES_PER_VIDEO = 8
# Tokens of a domain that are kept for each layer.
TOKENS_PER_DOMAIN = 4096
# Rounds of clustering, each with the covariance that the one before found, and steps of each.
ROUNDS, STEPS = 2, 10


def assemble_with_routers(
    base: str | os.PathLike,
    loras: Mapping[str, str | os.PathLike | None],
    videos: Mapping[str, Sequence[Video]],
    *,
    experts_per_lora: int = 6,
    num_experts_per_tok: int = 1,
    num_frames: int = 200,
    show_progress_bar: bool = True,
    device: str | torch.device | None = None,
) -> SamoeModel:
    """Makes a model whose experts are LoRAs of PEFT, each for one domain.

    Its `lora_rank` is the highest of the LoRAs', its layers with experts are all that any of them has.

    Args:
        base: the model that the LoRAs were trained on, as `SamoeModel.from_pretrained` takes it; experts that it has
            must be without effect, since the new ones take their place.
        loras: domain -> folder or Hub id of a LoRA, in the order of the experts; None for a domain on which the base is
            good as it is.
        videos: domain -> videos with masks.
        experts_per_lora: how many experts each LoRA becomes, equal but for their router rows: as many kinds of tokens
            as a domain can have. The experts of the first LoRA come first, then those of the second, and so on.
        num_experts_per_tok: experts that a token goes to; with 1, each LoRA has its whole effect.
        num_frames: frames of each domain that the routers are computed from.
        device: where the model is put and run.

    Raises:
        InputError: if there is no LoRA, the base's experts have an effect, or it lacks a layer of the LoRAs.
    """
    read = [None if source is None else read_lora(source) for source in loras.values()]
    model = SamoeModel.from_pretrained(base).to(device)
    if with_effect := [name for name, module in expert_modules(model) if module.lora_B.any()]:
        raise InputError(f"{base} has experts with an effect, such as those of {with_effect[0]!r}.")
    layers = [(name, *layer) for lora in read if lora is not None for name, layer in lora.layers.items()]
    if not layers:
        raise InputError("`loras` must hold at least one LoRA.")
    names, rank = {name for name, *_ in layers}, max(len(A) for _, A, _, _ in layers)
    if missing := names - {name for name, _ in model.named_modules()}:
        raise InputError(f"`loras` have a layer {min(missing)!r}, which {base} does not have.")
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
    for number, lora in enumerate(read):
        if lora is not None:
            tensors = expert_tensors(model, lora)
            experts = slice(number * experts_per_lora, (number + 1) * experts_per_lora)
            for name, module in expert_modules(model):
                module.lora_A.data[experts], module.lora_B.data[experts] = tensors[name]
    fit_routers(model, load_processor(base, model), [videos[name] for name in loras], num_frames, show_progress_bar)
    return model


@torch.no_grad()
def fit_routers(
    model: SamoeModel,
    processor: ProcessorMixin,
    videos: Sequence[Sequence[Video]],
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
        videos: of each domain, in the order of the experts, with masks.
        num_frames: frames that are tracked of each domain, twice, a few of each video.
    """
    per_domain = model.config.num_experts // len(videos)
    for forced in (True, False):
        tokens: dict[str, list[list[Tensor]]] = {name: [[] for _ in videos] for name, _ in expert_modules(model)}
        for domain, domain_videos in enumerate(videos):

            def store(name: str, read: Tensor, domain: int = domain, tokens: dict = tokens) -> None:
                some = min(math.ceil(TOKENS_PER_DOMAIN / num_frames), len(read))
                tokens[name][domain].append(read[_even_indices(len(read), some)].cpu())

            description = f"domain {domain + 1}/{len(videos)}, {'own expert' if forced else 'as routed'}"
            with route_all_to(model, domain * per_domain) if forced else nullcontext(), _observe_inputs(model, store):
                _track(model, processor, domain_videos, num_frames, description, show_progress_bar)
        for name, module in expert_modules(model):
            if all(tokens[name]):  # else the layer was not run
                weight, bias = discriminants([torch.cat(parts).double() for parts in tokens[name]], per_domain)
                module.router.weight.copy_(weight)
                module.router.bias.copy_(bias)


def discriminants(domains: Sequence[Tensor], per_domain: int) -> tuple[Tensor, Tensor]:
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
    videos: Sequence[Sequence[Video]],
    num_frames: int = 50,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """How much of the gates' weight goes to each domain's own experts while its videos are tracked.

    Returns:
        name of each layer with experts that was run -> (domains,), 0 to 1.
    """
    per_domain = model.config.num_experts // len(videos)
    modules = dict(expert_modules(model))
    sums, counts = ({name: torch.zeros(len(videos), dtype=torch.float64) for name in modules} for _ in range(2))
    for domain, domain_videos in enumerate(videos):

        def add(name: str, read: Tensor, domain: int = domain) -> None:
            module, own = modules[name], slice(domain * per_domain, (domain + 1) * per_domain)
            logits = F.linear(read, module.router.weight, module.router.bias)
            sums[name][domain] += module.gates(logits)[:, own].double().sum().cpu()
            counts[name][domain] += len(read)

        with _observe_inputs(model, add):
            description = f"routing {domain + 1}/{len(videos)}"
            _track(model, processor, domain_videos, num_frames, description, show_progress_bar)
    return {name: sums[name] / counts[name] for name in modules if counts[name].all()}


@contextmanager
def _observe_inputs(model: SamoeModel, observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the context is open, `observe` gets the name of each layer that is run, and what its router reads.

    Tokens (tokens, features) that are zero, such as the padding of windows, are left out: no expert affects them.
    """

    def hook(name: str) -> Callable:
        def pass_on(_, inputs: tuple[Tensor]) -> None:
            tokens = inputs[0].flatten(0, -2)
            tokens = tokens[tokens.any(dim=1)]
            if len(tokens):
                observe(name, tokens)

        return pass_on

    with open_hooks(module.register_forward_pre_hook(hook(name)) for name, module in expert_modules(model)):
        yield


def _track(
    model: SamoeModel,
    processor: ProcessorMixin,
    videos: Sequence[Video],
    num_frames: int,
    description: str,
    show_progress_bar: bool,
) -> None:
    """Tracks the first frames of videos, from the masks of the first that shows an object, `num_frames` in all."""
    num_left = num_frames
    progress = tqdm(total=num_frames, desc=description, unit="frame", disable=not show_progress_bar)
    with evaluation_mode(model), progress:
        for number in random.Random(0).sample(range(len(videos)), len(videos)):
            video = videos[number]
            start = video.first_visible
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="the model that the LoRAs were trained on")
    parser.add_argument("loras", nargs="+", metavar="[NAME=]LORA", help="folder or Hub id of a PEFT adapter")
    parser.add_argument("--dataset", action="append", required=True, help="as for `samoe assemble`")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the model; new or empty")
    parser.add_argument("--frames", type=int, default=200, help="frames of each domain (%(default)s)")
    parser.add_argument(
        "--experts-per-lora", type=int, default=6, help="kinds of tokens that a domain can have (%(default)s)"
    )
    add_device_option(parser)
    parsed = parser.parse_args(arguments)
    loras, videos = match_domains(parsed.loras, parsed.dataset)
    torch.manual_seed(0)  # for what the LoRAs leave open: rows of A beyond their rank, where B is zero
    settings = {"experts_per_lora": parsed.experts_per_lora, "num_frames": parsed.frames, "device": parsed.device}
    with new_folder(parsed.output) as folder:
        model = assemble_with_routers(parsed.base, loras, videos, **settings)
        processor = load_processor(parsed.base, model)
        shares = routed_right(model, processor, [videos[name] for name in loras])
        model.save_pretrained(folder, processor=processor)
    print("Share of the gates' weight that goes to a domain's own experts, mean of all layers:")
    for domain, name in enumerate(loras):
        print(f"  {name:20s} {sum(share[domain].item() for share in shares.values()) / len(shares):.3f}")
    config = model.config
    print(f"{config.num_experts} experts of rank {config.lora_rank} in {len(shares)} layers, in {parsed.output}")


if __name__ == "__main__":
    main()
