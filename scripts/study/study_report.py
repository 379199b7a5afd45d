"""The results of a study: one file of all scores, their means over seeds and orders, a report and its pictures."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from samoe_hf.errors import InputError
from samoe_hf.whole_files import whole_file, write_text
from study_gate import UNKNOWN
from study_methods import LABELS
from study_plan import StudyPlan
from study_plots import plot_confusion, plot_finals, plot_stages, plot_trade_off

SCORES = ("J", "F", "J&F")
OURS, CEILING, BASE = "auto", "own_lora", "base"
RESULTS_FILE = "results.json"
# What a study's units of work leave, within its folder.
UNIT_FILE = re.compile(r"seed_\d+/(\w+|own_lora/\w+|order_[\w-]+/\w+/stage_\d+)\.json")


def write_report(plan: StudyPlan, folder: Path) -> dict[str, Any]:
    """Collects what is finished of a study, and writes `results.json`, `report.md` and pictures.

    Returns:
        what `results.json` holds.
    """
    entries, added = collect(plan, folder)
    gates, times = _read_by_seed(folder, "gate.json"), _read_by_seed(folder, "time.json")
    names = [plan.base.name, *[d.name for d in plan.domains if d.name in plan.orders[0]]]
    results = {
        "study": plan.identity(),
        "summary": summarize_methods(entries, plan),
        "added": added,
        "gate": {"by_seed": gates, "confusion": _sum_counts(gates.values())},
        "time_per_frame": times,
        "entries": entries,
        "units": _read_units(folder),
    }
    write_text(folder / RESULTS_FILE, json.dumps(results, indent=1))
    if results["summary"]:
        figure = plot_trade_off(results["summary"], LABELS, OURS, (BASE, CEILING))
        _save(figure, folder / "gain_and_forgetting.png")
        megabytes = {method: _size(added, method)["bytes"] / 1e6 for method in results["summary"]}
        _save(plot_finals(results["summary"], names, LABELS, megabytes), folder / "domains.png")
        _save(plot_stages(stage_tables(entries, names), names, LABELS), folder / "stages.png")
    if gates:
        _save(plot_confusion(results["gate"]["confusion"], names, UNKNOWN), folder / "gate.png")
    write_text(folder / "report.md", report_text(results, plan, names))
    return results


def _read_units(folder: Path) -> dict[str, Any]:
    """File of a unit of work, within the folder -> its content."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("seed_*/**/*.json"))
    return {name: _read(folder / name) for name in names if UNIT_FILE.fullmatch(name)}


def read_results(folder: Path) -> dict[str, Any]:
    """What the `results.json` of a study's folder holds.

    Raises:
        ValueError: if it is none of a study, such as that of an evaluation.
    """
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}.") from error
    if not isinstance(results, dict) or not all(isinstance(results.get(name), dict) for name in ("study", "units")):
        raise InputError(f"{path} is not that of a study, which has `study` and `units`. Choose another `--output`.")
    return results


def restore_units(folder: Path) -> None:
    """Writes the files of a study's units, where a folder has their `results.json` alone.

    Raises:
        ValueError: if `results.json` names other files; nothing is written then.
    """
    if any(folder.glob("seed_*")):
        return
    units = read_results(folder)["units"]
    for name in units:
        if not UNIT_FILE.fullmatch(name):
            raise InputError(f"{folder / RESULTS_FILE} has {name!r} in `units`, which is no file of a study.")
    for name, content in units.items():
        write_text(folder / name, json.dumps(content, indent=1))


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)


def collect(plan: StudyPlan, folder: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]]]:
    """All scores that are there, and what each method adds to the base after the last stage, in the mean of its runs.

    Returns:
        entries of `method`, `order`, `seed`, `stage` (0 before the first domain), `domain`, J, F and J&F; and
        method -> `parameters` and `bytes`.
    """
    entries, sizes = [], defaultdict(list)
    for seed_folder in sorted(folder.glob("seed_*")):
        seed, base = int(seed_folder.name.removeprefix("seed_")), _read(seed_folder / "base.json")
        if base is None:
            continue
        own = {name: _read(seed_folder / "own_lora" / f"{name}.json") for name in plan.orders[0]}
        for order_folder in sorted(seed_folder.glob("order_*")):
            label = order_folder.name.removeprefix("order_")
            order = label.split("-")

            def add(method: str, stage: int, scores: Mapping[str, Any], seed: int = seed, label: str = label) -> None:
                entries.extend(
                    {"method": method, "order": label, "seed": seed, "stage": stage, "domain": name, **of_domain}
                    for name, of_domain in scores.items()
                )

            finished = [m for m in LABELS if m not in (BASE, CEILING)]
            chains = {m: _stages(order_folder / m, len(order)) for m in finished}
            if not any(chains.values()):
                continue
            chains[BASE] = [{"scores": base}] * len(order)
            if all(own.values()):
                learned = [{name: own[name]["scores"][name] for name in order[:k]} for k in range(1, len(order) + 1)]
                size = {key: sum(own[name]["added"][key] for name in order) for key in ("parameters", "bytes")}
                chains[CEILING] = [{"scores": base | scores, "added": size} for scores in learned]
            for method in LABELS:
                stages = chains.get(method) or []
                if stages:
                    add(method, 0, base)
                for number, stage in enumerate(stages, start=1):
                    add(method, number, stage["scores"])
                if len(stages) == len(order):
                    sizes[method].append(stages[-1].get("added", {"parameters": 0, "bytes": 0}))
    keys = ("parameters", "bytes")
    added = {name: {key: round(statistics.fmean(x[key] for x in runs)) for key in keys} for name, runs in sizes.items()}
    return entries, added


def _stages(folder: Path, num_stages: int) -> list[dict[str, Any]]:
    """The finished stages of a method, without gaps."""
    stages = []
    for number in range(1, num_stages + 1):
        stage = _read(folder / f"stage_{number}.json")
        if stage is None:
            break
        stages.append(stage)
    return stages


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _read_by_seed(folder: Path, name: str) -> dict[str, Any]:
    """Seed, as text -> content of a file of its folder."""
    return {path.parent.name.removeprefix("seed_"): _read(path) for path in sorted(folder.glob(f"seed_*/{name}"))}


def _sum_counts(gates: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Confusion matrices of several seeds, added up."""
    total: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for gate in gates:
        for name, counts in gate["confusion"].items():
            for decided, count in counts.items():
                total[name][decided] += count
    return {name: dict(counts) for name, counts in total.items()}


# --- Gain and forgetting


def summarize_methods(entries: Sequence[Mapping[str, Any]], plan: StudyPlan) -> dict[str, dict[str, Any]]:
    """Gain and forgetting of each method whose orders are finished, in points of J, F and J&F (0 to 100).

    Gain is the mean over learned domains of the final score less the base's. Forgetting is the mean, over the base's
    domain and all learned domains but the last, of the score right after learning less the final score.

    Returns:
        method -> `runs`, and for each score and "gain" and "forgetting" the `mean` over runs, and `std`, the standard
        deviation over seeds (each its mean over orders), None for one seed; `final`: domain -> mean final J&F.
    """
    runs: dict[str, dict[tuple[str, int], dict]] = defaultdict(lambda: defaultdict(dict))
    for entry in entries:
        runs[entry["method"]][entry["order"], entry["seed"]][entry["stage"], entry["domain"]] = entry
    summary = {}
    for method in LABELS:
        finished = {key: run for key, run in runs[method].items() if max(stage for stage, _ in run) == plan.num_domains}
        if finished:
            summary[method] = _summarize_runs(finished, plan)
    return summary


def _summarize_runs(runs: Mapping[tuple[str, int], Mapping], plan: StudyPlan) -> dict[str, Any]:
    last = plan.num_domains
    summary: dict[str, Any] = {"runs": len(runs)}
    for score in SCORES:
        values = {"gain": defaultdict(list), "forgetting": defaultdict(list)}
        for (label, seed), run in runs.items():
            order = label.split("-")
            value = {key: 100 * _number(entry[score]) for key, entry in run.items()}
            values["gain"][seed].append(statistics.fmean(value[last, name] - value[0, name] for name in order))
            earlier = [(0, plan.base.name), *((stage, name) for stage, name in enumerate(order[:-1], start=1))]
            values["forgetting"][seed].append(
                statistics.fmean(value[stage, name] - value[last, name] for stage, name in earlier)
            )
        summary[score] = {what: _mean_and_std(by_seed) for what, by_seed in values.items()}
    final = defaultdict(list)
    for run in runs.values():
        for (stage, name), entry in run.items():
            if stage == last:
                final[name].append(100 * _number(entry["J&F"]))
    summary["final"] = {name: statistics.fmean(values) for name, values in final.items()}
    return summary


def _mean_and_std(by_seed: Mapping[int, Sequence[float]]) -> dict[str, float | None]:
    means = [statistics.fmean(values) for values in by_seed.values()]
    return {"mean": statistics.fmean(means), "std": statistics.stdev(means) if len(means) > 1 else None}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def stage_tables(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, list[list[float]]]]:
    """Order -> method -> rows of the stages, columns of the domains: J&F in points, mean over seeds."""
    values: dict[tuple, list[float]] = defaultdict(list)
    for entry in entries:
        key = (entry["order"], entry["method"], entry["stage"], entry["domain"])
        values[key].append(100 * _number(entry["J&F"]))
    tables: dict[str, dict[str, list[list[float]]]] = defaultdict(dict)
    for order, method in dict.fromkeys((key[0], key[1]) for key in values):
        stages = sorted({key[2] for key in values if key[:2] == (order, method)})
        tables[order][method] = [
            [statistics.fmean(values[order, method, stage, name]) for name in names] for stage in stages
        ]
    return dict(tables)


# --- Text


def report_text(results: Mapping[str, Any], plan: StudyPlan, names: Sequence[str]) -> str:
    """The report, in Markdown."""
    summary = results["summary"]
    seeds = sorted({entry["seed"] for entry in results["entries"]})
    orders = list(dict.fromkeys(entry["order"] for entry in results["entries"]))
    parts = [
        "# Learning domain after domain",
        f"The base has learned {plan.base.name}. Then it learns, in this order: "
        + "; or ".join(order.replace("-", ", ") for order in orders)
        + f". Seeds: {', '.join(map(str, seeds))}. Figures are J&F in points (0 to 100) on held-out videos, means over "
        "seeds and orders; ± is the standard deviation over seeds.",
        "![gain and forgetting](gain_and_forgetting.png)",
        "![scores by domain](domains.png)",
        "## Is ours beaten?",
        compare_with_ours(summary, names),
        "## All methods",
        "Gain: the mean over learned domains of the final score less the base's. Forgetting: the mean, over the base's "
        "domain and all learned domains but the last, of the score right after learning less the final score. "
        "[Stage by stage](stages.png).",
        _summary_table(summary, results["added"], names),
    ]
    if results["gate"]["by_seed"]:
        parts += ["## The gate", _gate_text(results, plan), "![decisions of the gate](gate.png)"]
    return "\n\n".join(parts) + "\n"


def _summary_table(summary: Mapping[str, Any], added: Mapping[str, Any], names: Sequence[str]) -> str:
    head = ["method", "gain", "forgetting", *names, "parameters added or changed", "MB", "runs"]
    rows = []
    for method, values in summary.items():
        size = _size(added, method)
        figures = [_with_spread(values["J&F"][what]) for what in ("gain", "forgetting")]
        finals = [f"{values['final'][name]:.1f}" for name in names]
        sizes = [f"{size['parameters']:,}", f"{size['bytes'] / 1e6:.2f}", str(values["runs"])]
        rows.append([LABELS[method], *figures, *finals, *sizes])
    lines = [" | ".join(row) for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(f"| {line} |" for line in lines)


def _size(added: Mapping[str, Any], method: str) -> Mapping[str, int]:
    """What a method adds to the base; nothing of one whose last stage is not there."""
    return added.get(method, {"parameters": 0, "bytes": 0})


def _with_spread(value: Mapping[str, float | None]) -> str:
    return f"{value['mean']:.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")


def compare_with_ours(summary: Mapping[str, Any], names: Sequence[str]) -> str:
    """In plain words, which methods beat ours, in what and by how much."""
    if OURS not in summary:
        return f"{LABELS[OURS].capitalize()} are not finished yet."
    ours, lines = summary[OURS], []
    for method, values in summary.items():
        if method in (OURS, CEILING, BASE):
            continue
        better = []
        if (more := _mean(values, "gain") - _mean(ours, "gain")) > 0:
            better.append(f"gain (by {more:.1f} points)")
        if (less := _mean(ours, "forgetting") - _mean(values, "forgetting")) > 0:
            better.append(f"forgetting (less by {less:.1f} points)")
        better += [
            f"the final score on {name} (by {values['final'][name] - ours['final'][name]:.1f} points)"
            for name in names
            if values["final"][name] > ours["final"][name]
        ]
        if better:
            lines.append(f"- {LABELS[method]} beats it in {', '.join(better)}.")
    which = "These methods are" if lines else "No method is"
    beaten = f"Ours is {LABELS[OURS]!r}. {which} ahead of it in gain, forgetting or the final score on a domain"
    beaten += ":" if lines else "."
    text = "\n".join([beaten, "", *lines]).rstrip()
    if CEILING in summary:
        gain, ceiling = _mean(ours, "gain"), _mean(summary[CEILING], "gain")
        text += f"\n\nOurs reaches a gain of {gain:.1f} points, own LoRAs {ceiling:.1f}"
        text += f" ({100 * gain / ceiling:.1f} %)." if ceiling > 0 else "."
    if "full" in summary:
        text += f" It forgets {_mean(ours, 'forgetting'):.1f} points, full fine-tuning "
        text += f"{_mean(summary['full'], 'forgetting'):.1f}."
    return text


def _mean(values: Mapping[str, Any], what: str) -> float:
    return values["J&F"][what]["mean"]


def _gate_text(results: Mapping[str, Any], plan: StudyPlan) -> str:
    gates, confusion = results["gate"]["by_seed"], results["gate"]["confusion"]
    alike = {name for d in plan.domains if d.looks_like for name in (d.name, d.looks_like)} & set(confusion)
    right = {name: counts.get(name, 0) for name, counts in confusion.items()}
    base = plan.base.name
    right[base] = right.get(base, 0) + confusion.get(base, {}).get(UNKNOWN, 0)

    def share(names: Iterable[str]) -> str:
        total = sum(sum(confusion[name].values()) for name in names)
        return f"{100 * sum(right[name] for name in names) / total:.1f} % of {total} held-out frames" if total else "–"

    lines = [
        f"- Right on {share([n for n in confusion if n not in alike])} of distinct domains (a frame of {base} is right "
        "where it gets the base's masks)."
    ]
    if alike:
        lines.append(f"- Right on {share(sorted(alike))} of domains that look alike ({', '.join(sorted(alike))}).")
    for name in next(iter(gates.values()))["unseen"]:
        unseen = [gate["unseen"][name] for gate in gates.values()]
        share_to_base = 100 * statistics.fmean(one["to_base"] for one in unseen)
        identical = {True: "to the bit", False: "NOT to the bit", None: "not compared"}[_all(unseen)]
        lines.append(f"- Never shown {name}: {share_to_base:.1f} % of its frames get the base ({identical}).")
    for name in next(iter(gates.values()))["wrong_experts"]:
        wrong = [gate["wrong_experts"][name] for gate in gates.values()]
        points = 100 * statistics.fmean(_number(one["J&F"]) for one in wrong)
        own = results["summary"].get(CEILING, {}).get("final", {}).get(name, math.nan)
        lines.append(
            f"- {name} with the experts of {wrong[0]['experts_of']}: J&F {points:.1f}, with its own {own:.1f}."
        )
    for seed, measured in results["time_per_frame"].items():
        ratio = 100 * (measured["with_gate_ms"] / measured["without_ms"] - 1)
        lines.append(
            f"- Time per frame (seed {seed}, {measured['num_frames']} frames): {measured['with_gate_ms']:.2f} ms with "
            f"the gate, {measured['without_ms']:.2f} ms with the domain given ({ratio:+.1f} %)."
        )
    return "\n".join(lines)


def _all(unseen: Sequence[Mapping[str, Any]]) -> bool | None:
    compared = [one["identical"] for one in unseen if one["identical"] is not None]
    return all(compared) if compared else None
