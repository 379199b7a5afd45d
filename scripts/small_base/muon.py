"""Muon for the weights of linear layers, and AdamW for all else, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class MuonAndAdamW(torch.optim.Optimizer):
    """PyTorch's Muon for weight matrices, with steps as large as AdamW's (arXiv:2502.16982), and AdamW for the rest.

    Args:
        groups: parameters, or groups of them with "lr" and "weight_decay", as PyTorch's optimizers take them.
    """

    def __init__(self, groups: Any, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        split = []
        for group in self.param_groups:
            for by_muon in (True, False):
                chosen = [one for one in group["params"] if _is_matrix(one) == by_muon]
                if chosen:
                    split.append({**group, "params": chosen, "by_muon": by_muon})
        self.param_groups = split
        self._share()

    def _share(self) -> None:
        """Lets both optimizers work on this one's groups and state."""
        kinds = (True, torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}), (False, torch.optim.AdamW, {})
        self.parts = []
        for by_muon, kind, options in kinds:
            groups = [group for group in self.param_groups if group["by_muon"] == by_muon]
            if groups:
                part = kind(groups, **options)
                part.state = self.state
                self.parts.append(part)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        assert closure is None
        for part in self.parts:
            part.step()


def _is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter is the weight of a linear layer, and no row of embeddings or small table."""
    return parameter.ndim == 2 and min(parameter.shape) > 8
