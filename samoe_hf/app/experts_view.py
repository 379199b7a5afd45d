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
from samoe_hf.model.domain_experts import module_layer
from samoe_hf.model.tracking import TrackedRow
from samoe_hf.plots.experts import plot_bars, routing_video

from .session import TrackingSession
from .snapshots import restore_snapshot, take_snapshot

WHOLE_FRAME = "whole frame"


@dataclass
class LayerView:
    """A layer on a frame: by object (None where it runs once for all) the chosen experts (h, w), and mean weights."""

    num_experts: int
    maps: dict[int | None, np.ndarray] = field(default_factory=dict)
    gates: dict[int | None, np.ndarray] = field(default_factory=dict)


@dataclass
class ExpertsView:
    """What the routers did on a frame. `layers`: name for people -> what is known of it, the most telling one first."""

    frame: int
    domain: str | None
    layers: dict[str, LayerView]

    def draw_map(self, session: TrackingSession, layer: str, object_id: int | None) -> np.ndarray:
        """The frame with its mask at the left, with the chosen experts at the right, a legend below: (H, W, 3) uint8.

        Raises:
            ValueError: an unknown layer or object, or one without a map.
        """
        view = self._layer(layer)
        if not view.maps:
            raise InputError(f"{layer} works on memories, not on positions of the frame: choose another layer.")
        key = None if None in view.maps else object_id
        if key not in view.maps:
            raise InputError(f"`object` must be one of {', '.join(map(str, view.maps))}, got {object_id!r}.")
        id_map = session.id_map(self.frame)
        mask = id_map > 0 if key is None else id_map == key
        shown = WHOLE_FRAME if key is None else f"object {key}"
        title = f"Expert of largest weight in {layer}: frame {self.frame}, {shown}"
        frame = session.frame(self.frame)
        return next(routing_video([frame], mask[None], view.maps[key][None], view.num_experts, title))

    def draw_usage(self, layer: str) -> Figure:
        """Bars of the mean weight of each expert, by object; ValueError for an unknown layer."""
        view = self._layer(layer)
        series = {WHOLE_FRAME if key is None else f"object {key}": gates for key, gates in view.gates.items()}
        return plot_bars({layer: series}, "mean gate weight", f"Experts by object, frame {self.frame}")

    def _layer(self, layer: str) -> LayerView:
        if not isinstance(layer, str) or layer not in self.layers:
            raise InputError(f"`layer` must be one of {', '.join(self.layers)}, got {layer!r}.")
        return self.layers[layer]


def look_at_experts(session: TrackingSession, frame: int) -> ExpertsView:
    """Tracks a frame once more to see what the routers do there; the session stays as it is.

    Raises:
        ValueError: nothing is prompted, or no router runs on this frame.
    """
    session.id_map(frame)  # checks the frame
    if not session.prompts:
        raise InputError("Nothing is prompted yet: click on an object first.")
    model, layers = session.model.model, {}

    def keep(name: str, rows: Sequence[TrackedRow], logits: Tensor) -> None:
        if rows[0].frame_idx == frame:
            _add(layers, model, name, rows, logits)

    with session.exclusive() as state, session.device():
        before = take_snapshot(state)
        try:
            with observe_routers(model, keep):
                # What prompts gave becomes memories, as before any tracking; then the frame reads them.
                for output in model.propagate_in_video_iterator(state, start_frame_idx=frame, max_frame_num_to_track=0):
                    domain = output.domain
                    break
        finally:
            restore_snapshot(state, before)
    if not layers:
        raise InputError(
            "No expert runs on this frame: experts read memories, and the frame that an object is prompted on has none "
            "yet, or the video got no domain's experts. Go to a frame that was tracked."
        )
    maps_first = image_modules(layers)[::-1]
    order = [*maps_first, *(name for name in layers if name not in maps_first)]
    return ExpertsView(frame, domain, {short_name(name): layers[name] for name in order})


def _add(layers: dict[str, LayerView], model, name: str, rows: Sequence[TrackedRow], logits: Tensor) -> None:
    module = model.get_submodule(name)
    layer = module_layer(name)
    view = layers.setdefault(layer, LayerView(module.num_experts))
    side = math.isqrt(logits.shape[1])
    has_map = bool(image_modules([layer])) and side * side == logits.shape[1]
    sums = RouterSums.from_logits(logits, min(module.num_experts_per_tok, module.num_experts))
    experts = logits.argmax(dim=-1).cpu().numpy().astype(np.int16)
    for row, one, chosen in zip(rows, sums, experts, strict=True):
        view.gates[row.object_id] = one.mean_gates
        if has_map:
            view.maps[row.object_id] = chosen.reshape(side, side)
