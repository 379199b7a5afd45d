"""What a model's experts do on a frame of a session: where each is chosen, and how much each object uses them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from samoe_hf.analysis.routing import image_modules, observe_routers, short_name
from samoe_hf.analysis.usage import RouterSums
from samoe_hf.errors import InputError
from samoe_hf.model.batch_rows import BatchRow
from samoe_hf.model.domain_experts import module_layer
from samoe_hf.model.expert_layer import expert_modules
from samoe_hf.plots.experts import plot_bars, routing_video

from .models import DEVICE_LOCK
from .session import NOTHING_PROMPTED, TrackingSession, copied


@dataclass
class LayerView:
    """A layer on a frame: by object (None where it runs once for all) chosen experts (h, w), and sums of weights."""

    num_experts: int
    maps: dict[int | None, np.ndarray] = field(default_factory=dict)
    sums: dict[int | None, RouterSums] = field(default_factory=dict)

    @property
    def gates(self) -> dict[int | None, np.ndarray]:
        """By object the mean weight of each expert."""
        return {object_id: sums.mean_gates for object_id, sums in self.sums.items()}


@dataclass
class ExpertsView:
    """What the routers did on a frame. `layers`: name for people -> what is known of it, the most telling one first."""

    frame: int
    layers: dict[str, LayerView]

    def draw_map(self, session: TrackingSession, layer: str, object_id: int | None) -> np.ndarray:
        """The frame with its mask at the left, with the chosen experts at the right: (H, W, 3) uint8."""
        view, id_map = self.layers[layer], session.id_map(self.frame)
        mask = id_map > 0 if object_id is None else id_map == object_id
        title = f"Expert of largest weight in {layer}: frame {self.frame}, {_called(object_id)}"
        frame, experts = session.frame(self.frame), view.maps[object_id]
        return next(routing_video([frame], mask[None], experts[None], view.num_experts, title))

    def draw_usage(self, layer: str) -> Figure:
        """Bars of the mean weight of each expert, by object."""
        series = {_called(object_id): gates for object_id, gates in self.layers[layer].gates.items()}
        return plot_bars({layer: series}, "mean gate weight", f"Experts by object, frame {self.frame}")


def _called(object_id: int | None) -> str:
    return "whole frame" if object_id is None else f"object {object_id}"


def look_at_experts(session: TrackingSession, frame: int) -> ExpertsView:
    """Tracks a frame once more, back for objects whose first prompt comes later, to see what the routers do there.

    The session stays as it is. An InputError where nothing is prompted, or no router runs on this frame.
    """
    if not session.prompts:
        raise InputError(NOTHING_PROMPTED)
    model, layers = session.loaded.model, dict[str, LayerView]()
    modules = dict(expert_modules(model))

    def keep(name: str, rows: Sequence[BatchRow], logits: Tensor) -> None:
        # What prompts gave becomes memories before the frame is tracked, on frames of their own.
        here = [number for number, row in enumerate(rows) if row.frame_idx == frame]
        if not here:
            return
        rows, logits = [rows[number] for number in here], logits[here]
        layer, module, side = module_layer(name), modules[name], math.isqrt(logits.shape[1])
        view = layers.setdefault(layer, LayerView(module.num_experts))
        sums = RouterSums.from_logits(logits, min(module.num_experts_per_tok, module.num_experts))
        for (_, _, object_id), one in zip(rows, sums, strict=True):
            view.sums[object_id] = view.sums[object_id] + one if object_id in view.sums else one
        if image_modules([layer]) and side * side == logits.shape[1]:
            experts = logits.argmax(dim=-1).cpu().numpy().astype(np.int16).reshape(len(rows), side, side)
            view.maps |= {row.object_id: chosen for row, chosen in zip(rows, experts, strict=True)}

    with session.exclusive() as tracking, DEVICE_LOCK, observe_routers(model, keep):
        for back in {first > frame for first in session.firsts.values()}:
            next(model.propagate_from_prompts_iterator(copied(tracking), frame, back))
    if not layers:
        raise InputError(
            "No expert runs on this frame: experts read memories, and the frame that an object is prompted on has none "
            "yet, or the video got no domain's experts. Go to a frame that was tracked."
        )
    first = image_modules(layers)[::-1]
    return ExpertsView(frame, {short_name(name): layers[name] for name in dict.fromkeys([*first, *layers])})
