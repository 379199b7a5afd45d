"""Compare how methods learn domain after domain, and what they forget, as a YAML says.

    python scripts/study/run_study.py --output outputs/study
    python scripts/study/run_study.py --output outputs/study --root davis=data/DAVIS --root ct=data/ct_lesions
    python scripts/study/run_study.py --output outputs/quick --quick      # ten minutes on two cores

Run again, it goes on with what is missing. `--seeds 0` and `--seeds 1 2` in two processes share the work in one folder.
The folder gets `results.json`, `report.md` and pictures, which are written anew whenever a method is finished.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from samoe_hf.commands.options import add_device_option
from samoe_hf.errors import InputError
from study import METHODS, Study
from study_plan import read_plan

CONFIG = Path(__file__).parent / "study_forgetting.yaml"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study = parser.add_argument_group("study")
    study.add_argument("config", nargs="?", default=CONFIG, metavar="STUDY.yaml", help="(study_forgetting.yaml)")
    study.add_argument("--quick", action="store_true", help="the YAML's small variant, on synthetic domains")
    study.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="only these of the YAML's seeds")
    study.add_argument(
        "--orders", type=int, nargs="+", metavar="NUMBER", help="only these of the YAML's orders, counted from 0"
    )
    study.add_argument(
        "--methods",
        choices=METHODS,
        nargs="+",
        default=METHODS,
        metavar="METHOD",
        help=f"only these of {', '.join(METHODS)}",
    )
    videos = parser.add_argument_group("videos")
    videos.add_argument(
        "--root", action="append", default=[], metavar="DOMAIN=DIR", help="folder of a domain's data; may be repeated"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, default=Path("outputs/study"), metavar="DIR", help="folder of the study (%(default)s)"
    )
    add_device_option(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        run(parse_arguments(arguments))
    except InputError as error:
        raise SystemExit(str(error)) from error


def run(parsed: argparse.Namespace) -> None:
    roots = {}
    for text in parsed.root:
        name, equals_sign, root = text.partition("=")
        if not equals_sign or not root:
            raise InputError(f"`--root` must be DOMAIN=DIR, got {text!r}.")
        if not Path(root).is_dir():
            raise InputError(f"`--root` {text} names no folder.")
        roots[name] = root
    plan = read_plan(parsed.config, roots, parsed.quick)
    if parsed.seeds is not None:
        if unknown := sorted(set(parsed.seeds) - set(plan.seeds)):
            raise InputError(f"`--seeds` has {unknown[0]}, which is none of the study's {plan.seeds}.")
        plan = replace(plan, seeds=parsed.seeds)
    if parsed.orders is not None:
        if unknown := sorted(set(parsed.orders) - set(range(len(plan.orders)))):
            raise InputError(f"`--orders` has {unknown[0]}, but the study has {len(plan.orders)} orders.")
        plan = replace(plan, orders=[plan.orders[number] for number in parsed.orders])
    print(f"{plan.base.name}, then {', '.join(plan.orders[0])}; seeds {plan.seeds}")
    Study(plan, parsed.output, parsed.device, parsed.methods).run()
    print((parsed.output / "report.md").read_text(encoding="utf-8"))
    print(f"Written: report.md, results.json and pictures in {parsed.output}")


if __name__ == "__main__":
    main()
