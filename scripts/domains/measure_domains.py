"""The tables and the picture of `docs/domains.md`, measured with the small model that comes with the package.

    python scripts/domains/measure_domains.py --output outputs/domains
    python scripts/domains/measure_domains.py --output outputs/quick --quick

An hour and a half on one core. Each part writes `PART.md` and `PART.json`; `domains.png` is drawn of those that are
there.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from gate_parts import (
    measure_changed,
    measure_confirm,
    measure_few,
    measure_known,
    measure_many,
    read_dataset,
    read_looks,
)
from load_part import measure_load
from ranks_part import FIXED_RANKS, draw_ranks, measure_ranks
from samoe_hf import SamoeModel, small_base
from samoe_hf.data import SYNTHETIC_DOMAINS
from samoe_hf.evaluation.report import format_table
from samoe_hf.plots.evaluation import LINES
from strangers_part import measure_strangers


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `known` and `held_out`: videos of each look; `choices` of the known ones."""

    looks: Sequence[str] = SYNTHETIC_DOMAINS
    known: int = 64
    held_out: int = 48
    choices: int = 4
    few: Sequence[int] = (2, 3, 4, 8, 16, 32, 64)
    confirm: Sequence[int] = (3, 4, 6, 10, 18, 34, 64)
    many: Sequence[int] = (5, 20, 101)
    many_videos: tuple[int, int] = (12, 8)
    many_others: tuple[int, int] = (32, 8)
    load: Sequence[int] = (1, 5, 20, 100)
    repeats: int = 7
    learned: Sequence[str] = ("blobs", "stripes", "night", "echoes", "paper")
    unknown: Sequence[str] = ("shapes", "scenes")
    steps: int = 70
    training_videos: int = 200
    videos: int = 8
    seeds: Sequence[int] = (0, 1, 2)
    rank_looks: Sequence[str] = ("blobs", "stripes", "echoes")
    rank_steps: int = 30


QUICK = Sizes(
    looks=("stripes", "blobs"), known=4, held_out=2, choices=1, few=(2, 3), confirm=(3, 4), many=(1, 2),
    many_videos=(2, 1), many_others=(2, 1), load=(1, 2), repeats=1, learned=("blobs", "stripes"), unknown=("shapes",),
    steps=1, training_videos=4, videos=1, seeds=(0,), rank_looks=("blobs",), rank_steps=1,
)  # fmt: skip


def percent(share: float) -> str:
    return "100 %" if share > 0.995 else f"{100 * abs(round(share, 6)):.2g} %"


def jf(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f}"


def milliseconds(value: float) -> str:
    return f"{value:.1f} ms"


# Of each part: what its rows are told apart by, and the columns of its table: title, key of a row, format.
TABLES: dict[str, tuple[str, list[tuple[str, str, Callable[[Any], str]]]]] = {
    "known": ("look", [
        ("right", "right", percent), ("in a wrong domain", "wrong", percent),
        ("if it was never seen: to the base", "unseen", percent),
        ("to the base by the encoder's features alone", "alone", percent),
    ]),
    "changed": ("change", [
        ("base", "base", percent), ("the look's experts", "own", percent), ("another's", "another", percent),
    ]),
    "few": ("known", [
        ("own refused", "refused", percent), ('as `adapt` says, "or fewer"', "said", percent),
        ("other looks let in", "let in", percent), ("4 frames of each: own refused", "4 frames: refused", percent),
        ("other looks let in", "4 frames: let in", percent),
    ]),
    "confirm": ("known", [
        ("at once: recognized", "at once", percent), ("confirmed: recognized", "confirmed", percent),
        ("at once: others let in", "at once, let in", percent),
        ("confirmed: others let in", "confirmed, let in", percent),
        ("only those refused are confirmed: how many", "told", lambda x: f"{x:.1f}"),
        ("recognized", "refused ones", percent),
    ]),
    "many": ("domains", [
        ("right", "right", percent), ("base", "base", percent), ("in a wrong domain", "wrong", percent),
        ("looks that are unknown: to the base", "unknown to base", percent), ("the gate's time", "ms", milliseconds),
    ]),
    "load": ("domains", [
        ("files", "files", lambda x: f"{x:.1f} MB"), ("load", "load", lambda x: f"{x:.2f} s"),
        ("RAM", "RAM", lambda x: f"{x:.0f} MB"), ("tracking", "tracking", milliseconds),
    ]),
    "strangers": ("look", [
        ("nearest", "nearest", str), ("base", "base", jf), ("`nearest`", "experts", jf), ("`mix`", "mix", jf),
        ("mean of base and nearest", "base and nearest", jf), ("own experts", "own", jf),
    ]),
    "ranks": ("look", [
        ("base", "base", jf), *((f"rank {rank}", f"rank {rank}", jf) for rank in FIXED_RANKS),
        *((f"32 cut to the size of {rank}", f"cut to {rank}", jf) for rank in FIXED_RANKS[-2::-1]),
        ("auto", "auto", jf), ("its size", "chosen", lambda x: f"{x / 1e3:.0f} kB"),
    ]),
}  # fmt: skip


def mean(rows: Sequence[dict[str, Any]], key: str) -> Any:
    """The mean of what rows have, or the most frequent name."""
    values = [row[key] for row in rows]
    return (
        values[0]
        if None in values
        else statistics.mode(values)
        if isinstance(values[0], str)
        else sum(values) / len(values)
    )


def means(part: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each value of what rows are told apart by."""
    by, columns = TABLES[part]
    groups = {value: [row for row in rows if row[by] == value] for value in dict.fromkeys(row[by] for row in rows)}
    return [{by: value, **{key: mean(group, key) for _, key, _ in columns}} for value, group in groups.items()]


def table(part: str, rows: Sequence[dict[str, Any]]) -> str:
    by, columns = TABLES[part]
    lines = [[row[by], *(form(row[key]) for _, key, form in columns)] for row in means(part, rows)]
    if part == "strangers":
        lines.append(
            ["mean", *("" if key in ("nearest", "own") else form(mean(rows, key)) for _, key, form in columns)]
        )
    return format_table([by, *(title for title, _, _ in columns)], lines, markdown=True, left=()) + "\n"


def draw(output: Path) -> None:
    """`domains.png`, of the parts that are in the folder."""
    panels: dict[str, tuple[str, str, list[tuple[str, str, float]]]] = {
        "few": ("of one domain alone", "videos that the gate knows", [
            ("own videos refused", "refused", 100), ("what `adapt` says", "said", 100),
            ("of other looks let in", "let in", 100),
        ]),
        "confirm": ("`samoe domains confirm`", "videos that the gate knows", [
            ("learned at once", "at once", 100), ("3 learned, the rest confirmed", "confirmed", 100),
            ("others let in, at once", "at once, let in", 100), ("others let in, confirmed", "confirmed, let in", 100),
        ]),
        "many": ("many looks, 12 videos each", "domains", [
            ("right", "right", 100), ("in a wrong domain", "wrong", 100),
            ("unknown looks to the base", "unknown to base", 100),
        ]),
        "load": ("time and RAM", "domains of the model", [
            ("seconds to load", "load", 1), ("MB of RAM", "RAM", 1), ("ms a frame of tracking", "tracking", 1),
        ]),
    }  # fmt: skip
    found = [part for part in panels if (output / f"{part}.json").exists()]
    if not found:
        return
    figure = Figure(figsize=(3.25 * len(found), 3.9), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        title, label, lines = panels[part]
        rows = means(part, json.loads((output / f"{part}.json").read_text(encoding="utf-8"))["rows"])
        rows = [row for row in rows if isinstance(row[TABLES[part][0]], int)]  # not those that differ
        for number, (name, key, scale) in enumerate(lines):
            style, values = ("o-", "s--", "^:", "v:")[number], [scale * row[key] for row in rows]
            axes.plot(range(len(rows)), values, style, color=LINES[number], label=name)
        axes.set_xticks(range(len(rows)), [row[TABLES[part][0]] for row in rows])
        axes.set(title=title, xlabel=label, ylabel="% of further videos" if part != "load" else "")
        axes.set_yscale("log" if part == "load" else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(output / "domains.png", dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="parts, by default all")
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="FOLDER", help="`known` also knows these videos"
    )
    parser.add_argument("--quick", action="store_true", help="as little as can be, which shows that it runs")
    parser.add_argument("--output", type=Path, default=Path("outputs/domains"), metavar="DIR", help="(%(default)s)")
    parsed = parser.parse_args(arguments)
    sizes, output, only = QUICK if parsed.quick else Sizes(), parsed.output, parsed.only
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = SamoeModel.from_pretrained(small_base()).eval()
    looks, datasets = {}, {Path(folder).name: read_dataset(model, folder) for folder in parsed.dataset}
    if {"known", "changed", "few", "confirm"} & set(only):
        looks = read_looks(model, sizes.looks, sizes.known, sizes.held_out)
    measures: dict[str, Callable[[], Any]] = {
        "known": lambda: measure_known(model, looks, sizes.choices, datasets),
        "changed": lambda: measure_changed(model, looks, sizes.many_videos[1]),
        "few": lambda: measure_few(model, looks, sizes.few, sizes.choices),
        "confirm": lambda: measure_confirm(model, looks, sizes.confirm, sizes.choices),
        "many": lambda: measure_many(model, sizes.many, *sizes.many_videos, sizes.choices, sizes.many_others),
        "load": lambda: measure_load(sizes.load, output / "models", 24, sizes.repeats),
        "strangers": lambda: measure_strangers(
            sizes.learned,
            sizes.unknown,
            output / "strangers",
            sizes.steps,
            sizes.training_videos,
            sizes.videos,
            sizes.seeds,
        ),
        "ranks": lambda: measure_ranks(
            sizes.rank_looks, output / "ranks", sizes.rank_steps, sizes.training_videos, sizes.videos
        ),
    }
    for part in only:
        rows = measures[part]()
        (output / f"{part}.json").write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
        (output / f"{part}.md").write_text(table(part, rows), encoding="utf-8")
        print(f"{part}\n\n{table(part, rows)}")
        if part == "ranks":
            draw_ranks(rows, output / "ranks.png")
    draw(output)
    print(f"Written: tables and figures of {', '.join(only)}, and domains.png, in {output}")


if __name__ == "__main__":
    main()
