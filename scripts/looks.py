"""How good the list of frames worth a look is: which bad masks it finds, and what correcting its first frames gives.

python scripts/looks.py --output outputs/looks
python scripts/looks.py --model facebook/sam2.1-hiera-tiny --dataset DAVIS --output outputs/looks

Objects are prompted with their masks. Then the user corrects, with masks of the objects whose IoU is below 0.75, the
first 1, 3 and 5 frames of the list, or as many at even distances. `looks.md` has the mean J&F over objects, with
paired 95 % intervals.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from samoe_hf import SamoeModel, load_videos, small_base
from samoe_hf.data import SYNTHETIC_KINDS, SyntheticVideos, Video
from samoe_hf.evaluation.evaluate import evaluate_videos
from samoe_hf.evaluation.report import format_table
from samoe_hf.evaluation.statistics import combine_runs, compare_models
from samoe_hf.inference import load_processor
from selections import said

COUNTS = (1, 3, 5)
EASY = "easy"


def evaluate(model: SamoeModel, source: str, videos: Sequence[Video], prompt: str) -> dict[str, Any]:
    """The figures of a prompt, on all frames but those before an object is seen first."""
    results = evaluate_videos(model, load_processor(source, model), videos, prompt=prompt)
    return {"label": prompt, **combine_runs({None: list(results.values())}, "youtube_vos")}


def rows_of(
    name: str, model: SamoeModel, source: str, videos: Sequence[Video], prompt: str
) -> tuple[list[str], list[list[str]]]:
    """What the list finds in some videos, and what correcting its frames gives."""
    without = evaluate(model, source, videos, prompt)
    found, before = without["where_to_look"], without["summary"]["J&F_mean"]
    shares = [f"{100 * share:.0f} %" for share in (found["bad"] / found["masks"], found["found"], found["best"])]
    rows = []
    for count in COUNTS:
        look, even = (evaluate(model, source, videos, f"{prompt}@{count + 1}:{kind}") for kind in ("look", "even"))
        over = compare_models(look, even)["metrics"]["J&F_mean"]
        means = [f"{value:.3f}" for value in (before, *(one["summary"]["J&F_mean"] for one in (look, even)))]
        rows.append([name, str(count), *means, said(over)])
    return [name, str(found["masks"]), *shares], rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=small_base(), help="by default the small model that comes with the package")
    parser.add_argument("--dataset", action="append", default=[], metavar="FOLDER", help="also these videos")
    parser.add_argument("--kinds", nargs="*", choices=(*SYNTHETIC_KINDS, EASY), default=[*SYNTHETIC_KINDS, EASY])
    parser.add_argument("--videos", type=int, default=4, metavar="N", help="of each kind and seed (%(default)s)")
    parser.add_argument("--frames", type=int, default=32, metavar="N", help="of each video (%(default)s)")
    parser.add_argument("--prompt", default="mask", help="mask, box or clicks:N (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202], help="of videos (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/looks"), metavar="DIR", help="(%(default)s)")
    parsed = parser.parse_args(arguments)
    sets = {}
    for kind, seed in product(parsed.kinds, parsed.seeds):
        about = parsed.videos, parsed.frames, (128, 128), 2, "shapes", seed, () if kind == EASY else (kind,)
        sets.setdefault(EASY if kind == EASY else "hard", []).extend(SyntheticVideos(*about))
    sets |= {Path(folder).name: load_videos(folder) for folder in parsed.dataset}
    model = SamoeModel.from_pretrained(parsed.model)
    parsed.output.mkdir(parents=True, exist_ok=True)
    found_heading = ["videos", "masks", "J below 0.5", "of these in the first tenth", "at best"]
    heading = ["videos", "corrected frames", "J&F before", "of the list", "even", "list over even"]
    finds, corrections, text = [], [], ""
    for name, videos in sets.items():
        found, rows = rows_of(name, model, parsed.model, videos, parsed.prompt)
        finds.append(found)
        corrections += rows
        tables = format_table(found_heading, finds, markdown=True), format_table(heading, corrections, markdown=True)
        text = "\n\n".join(tables)
        # After each of the sets, which take hours on a CPU.
        (parsed.output / "looks.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
