"""Pictures of a study of forgetting: gain against forgetting, scores stage by stage, and the gate's decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from samoe_hf.plots.masks import plain_text

MARKERS = "osD^v<>PX*hdp8"
OURS_COLOR, OTHERS_COLOR, BOUND_COLOR = "#D55E00", "#0072B2", "#777777"


@plain_text
def plot_trade_off(
    summary: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], ours: str, bounds: Sequence[str]
) -> Figure:
    """Gain against forgetting, a point for each method with its spread over seeds; the best are at the upper left.

    Args:
        summary: method -> "J&F" -> "gain" and "forgetting" -> `mean` and `std` in points, as in `results.json`.
        labels: method -> what it is called.
        ours: the method that is drawn in another colour.
        bounds: methods that are no competitors, drawn in gray: the base, and what could be reached.
    """
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (method, values) in enumerate(summary.items()):
        color = OURS_COLOR if method == ours else BOUND_COLOR if method in bounds else OTHERS_COLOR
        gain, forgetting = values["J&F"]["gain"], values["J&F"]["forgetting"]
        axes.errorbar(
            forgetting["mean"],
            gain["mean"],
            xerr=forgetting["std"],
            yerr=gain["std"],
            fmt=MARKERS[number % len(MARKERS)],
            color=color,
            markersize=11 if method == ours else 8,
            markerfacecolor="none" if method in bounds else color,
            capsize=3,
            zorder=3 if method == ours else 2,
            label=labels[method],
        )
    axes.axvline(0, color="#AAAAAA", linewidth=0.8)
    axes.axhline(0, color="#AAAAAA", linewidth=0.8)
    axes.margins(0.08)
    axes.set(
        xlabel="forgetting: J&F points lost on earlier domains (less is better)",
        ylabel="gain: J&F points won on new domains",
    )
    axes.set_title("Learning domain after domain: what is won, and what is lost", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


@plain_text
def plot_finals(
    summary: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    labels: Mapping[str, str],
    megabytes: Mapping[str, float],
) -> Figure:
    """A matrix of methods and domains: J&F in points after the last domain was learned. The best of a column is framed.

    Args:
        summary: method -> `final`, domain -> mean J&F in points, as in `results.json`.
        names: of the columns, the base's domain first.
        labels: method -> what it is called.
        megabytes: method -> what it adds to the base, or changes of it.
    """
    table = np.array([[values["final"][name] for name in names] for values in summary.values()], dtype=float)
    rows = [f"{labels[method]} ({megabytes[method]:.2f} MB)" for method in summary]
    figure = Figure(figsize=(0.8 * len(names) + 4.6, 0.34 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    image = _draw_matrix(axes, table, rows, names, "{:.1f}", 100)
    for column, row in enumerate(np.nanargmax(table, axis=0)):
        frame = Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor=OURS_COLOR, linewidth=2)
        axes.add_patch(frame)
    axes.set_title("J&F of each domain at the end (points; framed: the best)", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


@plain_text
def plot_stages(
    tables: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], names: Sequence[str], labels: Mapping[str, str]
) -> Figure:
    """A matrix for each order and method: J&F in points of each domain after each stage.

    Args:
        tables: order, of names joined by "-" -> method -> rows of the stages, columns of the domains.
        names: of the columns, the base's domain first.
        labels: method -> what it is called.
    """
    methods = list(dict.fromkeys(method for of_order in tables.values() for method in of_order))
    width, height = 0.62 * len(names) + 1.4, 0.42 * (len(names) + 1) + 0.9
    columns = min(len(methods), 3)
    rows_each = -(-len(methods) // columns)
    figure = Figure(figsize=(columns * width, len(tables) * rows_each * height), layout="constrained")
    grid = figure.subplots(len(tables) * rows_each, columns, squeeze=False)
    image = None
    for number, (order, of_order) in enumerate(tables.items()):
        cells = grid[number * rows_each : (number + 1) * rows_each].flat
        for position, axes in enumerate(cells):
            if position >= len(methods) or methods[position] not in of_order:
                axes.set_axis_off()
                continue
            table = np.array(of_order[methods[position]], dtype=float)
            stages = ["before", *(f"+ {name}" for name in order.split("-"))][: len(table)]
            image = _draw_matrix(axes, table, stages, names, "{:.0f}", 100)
            axes.set_title(labels[methods[position]], fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.5, label="J&F (points)")
    figure.suptitle("J&F of each domain (columns) after each stage (rows)", fontsize=10)
    return figure


@plain_text
def plot_confusion(confusion: Mapping[str, Mapping[str, int]], names: Sequence[str], unknown: str) -> Figure:
    """The gate's decisions: rows of the true domains, columns of what was decided, in shares of each row.

    Args:
        confusion: domain -> decision -> number of frames.
        names: of domains, in order.
        unknown: what the decision for none of them is called.
    """
    decisions = [*names, unknown]
    counts = np.array([[confusion[name].get(decision, 0) for decision in decisions] for name in names], dtype=float)
    figure = Figure(figsize=(0.9 * len(decisions) + 2, 0.6 * len(names) + 1.8), layout="constrained")
    axes = figure.subplots()
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = [f"{name} (n = {int(total)})" for name, total in zip(names, counts.sum(axis=1), strict=True)]
    image = _draw_matrix(axes, shares, rows, decisions, "{:.1f}", 100)
    axes.set(xlabel="decided", ylabel="true")
    axes.set_title("Decisions of the gate on held-out frames (% of a row)", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _draw_matrix(
    axes: Axes, table: np.ndarray, rows: Sequence[str], columns: Sequence[str], style: str, largest: float
) -> Any:
    """Draws a table (rows, columns) of numbers from 0 to `largest`, with the numbers in it."""
    image = axes.imshow(table, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        color = "black" if value > 0.6 * largest else "white"
        axes.text(column, row, style.format(value), ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    return image
