"""What a training run logs between two logging steps: parts of the loss, and how tokens are routed."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from samoe_hf.model.experts import ExpertLinear
from samoe_hf.model.modeling_samoe import SamoeModel


class TrainingLogs:
    """Collects values under names and gives their means."""

    def __init__(self):
        self._values: dict[str, list[float | Tensor]] = defaultdict(list)

    def add_losses(self, parts: Mapping[str, Tensor]) -> None:
        """Adds the parts of a loss, each under `loss_PART`."""
        for name, part in parts.items():
            self._values[f"loss_{name}"].append(part)

    @torch.no_grad()
    def add_routing(self, model: SamoeModel, calls: Mapping[str, Sequence[Tensor]], domains: Sequence[str]) -> None:
        """Adds the routers' entropy (1 for equal probabilities) and the experts' weights, averaged over layers.

        Args:
            calls: name of each layer -> the router logits (..., experts) of each of its calls.
            domains: of the videos in the batch. Where the rows of a call do not tell videos apart, it is logged under
                the names of all.
        """
        for name, calls_of_layer in calls.items():
            module: ExpertLinear = model.get_submodule(name)
            for logits in calls_of_layer:
                by_video = [logits]
                if len(domains) > 1 and logits.shape[0] % len(domains) == 0:
                    by_video = logits.chunk(len(domains))
                names = domains if len(by_video) > 1 else ["+".join(sorted(set(domains)))]
                for domain, logits_of_video in zip(names, by_video, strict=True):
                    self._add_router(module, logits_of_video.float(), domain)

    def _add_router(self, module: ExpertLinear, logits: Tensor, domain: str) -> None:
        probabilities = logits.softmax(dim=-1).clamp(min=1e-12)
        entropy = -(probabilities * probabilities.log()).sum(dim=-1).mean()
        largest = max(math.log(module.num_experts), 1e-12)
        self._values[f"router_entropy/{domain}"].append(entropy.item() / largest)
        usage = module.gates(logits).flatten(0, -2).mean(dim=0)
        for expert, weight in enumerate(usage.tolist()):
            self._values[f"expert_usage/{domain}/{expert}"].append(weight)

    def means(self) -> dict[str, float]:
        """Name -> mean of the values since the last call."""
        means = {name: sum(map(float, values)) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means
