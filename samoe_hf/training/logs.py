"""What a training run logs between two logging steps: parts of the loss, and how tokens are routed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from torch import Tensor

from samoe_hf.model.clip import router_logits_by_clip
from samoe_hf.model.expert_layer import ExpertMixture
from samoe_hf.model.expert_router import record_router_logits
from samoe_hf.model.modeling_samoe import SamoeModel


class TrainingLogs:
    """Sums of losses and of routing over micro-batches, steps and processes. What it holds does not grow."""

    def __init__(self):
        self.num_steps = 0  # of the optimizer
        self._losses: dict[str, Tensor] = {}
        # Name -> sum of the values, and how many there were.
        self._routing: dict[str, tuple[float, int]] = {}

    def add_losses(self, parts: Mapping[str, Tensor]) -> None:
        """Adds the parts of a micro-batch's loss."""
        for name, part in parts.items():
            self._losses[name] = self._losses.get(name, 0) + part.detach()

    @contextmanager
    def recorded_routing(self, model: SamoeModel, object_mask: Tensor, domains: Sequence[str]) -> Iterator[None]:
        """Adds the routers' entropy (1 for equal probabilities) and the experts' weights of each clip that runs within.

        `object_mask` (B, N) is False for padded objects; each clip is logged under its domain.
        """
        with record_router_logits(model) as calls:
            yield
        by_clip = router_logits_by_clip(calls, object_mask)
        for logits_by_name, name_of_domain in zip(by_clip, domains, strict=True):
            for name, logits in logits_by_name.items():
                layer, logits = model.get_submodule(name), logits.detach().float()
                assert isinstance(layer, ExpertMixture)
                entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).mean().item()
                self._add(f"router_entropy/{name_of_domain}", entropy / math.log(max(layer.num_experts, 2)))
                for expert, weight in enumerate(layer.gates(logits).mean(dim=0).tolist()):
                    self._add(f"expert_usage/{name_of_domain}/{expert}", weight)

    def _add(self, name: str, value: float) -> None:
        total, count = self._routing.get(name, (0.0, 0))
        self._routing[name] = total + value, count + 1

    def collect(self) -> dict[str, float]:
        """Empties the logs; each process must call it.

        Returns `loss_PART`, summed over micro-batches and averaged over steps and processes; `router_entropy/DOMAIN`
        and `expert_usage/DOMAIN/EXPERT`, averaged over layers and clips.
        """
        losses = {name: float(total) / max(self.num_steps, 1) for name, total in self._losses.items()}
        gathered = gather_object([(losses, self._routing)])
        self.num_steps, self._losses, self._routing = 0, {}, {}
        logs = {f"loss_{name}": sum(other[name] for other, _ in gathered) / len(gathered) for name in losses}
        for name in sorted({name for _, routing in gathered for name in routing}):
            found = [routing[name] for _, routing in gathered if name in routing]
            logs[name] = sum(total for total, _ in found) / sum(count for _, count in found)
        return logs
