"""See it work: a small model learns two domains, one after another, and forgets nothing.

    python scripts/demo.py                                  # starts from the small base that comes with the package
    python scripts/demo.py --domain echoes --domain night   # other domains of synthetic videos
    python scripts/demo.py --model FOLDER                   # starts from any checkpoint

Each domain gets experts of its own, and a gate chooses whose experts a video gets. It needs no download, and about
eight minutes on one CPU core. Pictures are left in `outputs/demo`.
"""

if __name__ == "__main__":
    from samoe_hf.cli import quiet_libraries

    quiet_libraries()  # before they are imported

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from transformers import ProcessorMixin

from samoe_hf import SamoeModel, small_base
from samoe_hf.commands.options import add_original_options
from samoe_hf.continual.adapt import SMALL_MODEL_EXPERTS, Adaptation, adapt
from samoe_hf.data import SyntheticVideos, Video, write_palette_png, write_video
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.inference import VideoPrompt, load_processor, track_video
from samoe_hf.model.domain_choice import AUTO
from samoe_hf.plots.masks import DPI, OBJECT_COLORS, PANEL_INCHES, object_color, overlay_masks, plain_text
from samoe_hf.whole_files import write_text

# Looks that the small base knows, of those that are shown beside the new domains.
KNOWN_LOOKS = ("shapes", "scenes")
NUM_TRAIN_VIDEOS, NUM_TRAIN_FRAMES = 400, 4
NUM_TEST_VIDEOS, NUM_TEST_FRAMES = 4, 12
SHOWN_FRAMES = range(0, NUM_TEST_FRAMES, 2)
SHOWN_HEIGHT = 384  # of videos, in pixels
PANEL_PIXELS = 256  # least height of a frame in a picture
RIGHT = " \N{CHECK MARK}"
LABEL_BOX = {"facecolor": "white", "edgecolor": "black", "boxstyle": "round"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="folder, Hub id or original checkpoint, in place of the small base")
    add_original_options(model)
    training = parser.add_argument_group("training")
    training.add_argument(
        "--domain",
        action="append",
        dest="domains",
        metavar="NAME",
        help="of synthetic videos, to be learned; may be repeated (stripes, then blobs)",
    )
    training.add_argument("--steps", type=int, default=100, help="steps of training on each domain (%(default)s)")
    training.add_argument("--seed", type=int, default=0, help="of the training (%(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder to write (%(default)s)")
    parsed = parser.parse_args(arguments)
    parsed.domains = parsed.domains or ["stripes", "blobs"]
    if len(set(parsed.domains)) < len(parsed.domains):
        parser.error(f"--domain must name different domains, got {', '.join(parsed.domains)}")
    if any((parsed.output / domain).exists() for domain in parsed.domains):
        parser.error(f"--output {parsed.output} holds what an earlier demo learned; remove it, or give another folder")
    return parsed


def load_model(arguments: argparse.Namespace) -> SamoeModel:
    """The small base, or the checkpoint that was chosen."""
    source = arguments.model or small_base()
    return SamoeModel.from_pretrained(source, experts=arguments.experts, original_config=arguments.config).eval()


def write_run(domain: str, looks: Sequence[str], image_size: int, arguments: argparse.Namespace) -> Path:
    """Writes the YAML of the run that teaches a domain, as `samoe adapt` takes it; videos of all looks are tracked."""
    size = [image_size, image_size]
    train = {"kind": "synthetic", "num_videos": NUM_TRAIN_VIDEOS, "num_frames": NUM_TRAIN_FRAMES, "seed": 1}
    test = {"kind": "synthetic", "num_videos": NUM_TEST_VIDEOS, "num_frames": NUM_TEST_FRAMES, "seed": 2}
    run = {
        "train_data": [{**train, "domain": domain, "image_size": size}],
        "eval_data": [{**test, "domain": look, "image_size": size} for look in looks],
        "num_frames": NUM_TRAIN_FRAMES,
        "point_probability": 0.0,  # masks on the first frame
        "max_initial_frames": 1,
        **SMALL_MODEL_EXPERTS,
        "max_steps": arguments.steps,
        "per_device_train_batch_size": 4 if image_size <= 256 else 1,
        "learning_rate": 3.0e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, arguments.steps // 10),
        "max_grad_norm": 1.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "seed": arguments.seed,
    }
    path = arguments.output / f"{domain}.yaml"
    write_text(path, yaml.safe_dump(run, sort_keys=False))
    return path


def learn_domains(looks: Sequence[str], image_size: int, arguments: argparse.Namespace) -> dict[str, Adaptation]:
    """Teaches the domains one after another, each to the model that the one before left in its folder."""
    source, results = arguments.model or small_base(), {}
    options = {"experts": arguments.experts, "config": arguments.config}
    given = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    for number, domain in enumerate(arguments.domains, start=1):
        print(f"\nDomain {number} of {len(arguments.domains)}: {domain}", flush=True)
        run = write_run(domain, looks, image_size, arguments)
        target = arguments.output / domain
        results[domain] = adapt(source, domain, [str(run), *given], target)
        source, given = target, []
    return results


def results_table(results: Mapping[str, Adaptation]) -> str:
    """J&F of each look: of the base, and after each domain; and whose experts its videos got at last."""
    *_, last = results.values()
    stages = {"base": next(iter(results.values())).before} | {f"+ {name}": r.after for name, r in results.items()}
    lines = [f"{'J&F, 0 to 100':16s}" + "".join(f"{name:>12s}" for name in stages) + "   experts of"]
    for look, counts in last.routed.items():
        note = f" (learned {list(results).index(look) + 1}.)" if look in results else ""
        scores = "".join(f"{100 * scores[f'eval_{look}_J&F']:12.1f}" for scores in stages.values())
        whose = ", ".join(f"{name} {count} of {sum(counts.values())}" for name, count in counts.items())
        lines.append(f"{look:16s}{scores}   {whose}{note}")
    return "\n".join(lines)


def track(model: SamoeModel, processor: ProcessorMixin, video: Video, domain: str | None) -> list[np.ndarray]:
    """Maps of ids of a video's objects, which are prompted by their masks on frame 0."""
    given = zip(video.object_ids, video.masks(0), strict=True)
    prompts = [VideoPrompt(object_id, mask=mask) for object_id, mask in given]
    return [frame.id_map() for frame in track_video(model, processor, video.frames, prompts, domain=domain)]


def draw_look(model: SamoeModel, processor: ProcessorMixin, video: Video, output: Path) -> None:
    """Writes how a video is tracked: its masks, a video, and a picture beside the truth and what the base does."""
    base, with_experts = (track(model, processor, video, domain) for domain in (None, AUTO))
    truth = [video.id_map(t) for t in range(len(video))]
    folder = output / "masks" / video.video_id
    folder.mkdir(parents=True, exist_ok=True)
    for t, id_map in enumerate(with_experts):
        write_palette_png(folder / f"{t:05d}.png", id_map)
    pairs = (
        [overlay_masks(frame, shown, SHOWN_HEIGHT) for shown in (np.zeros_like(id_map), id_map)]
        for frame, id_map in zip(video.frames, with_experts, strict=True)
    )
    write_video(output / f"tracking_{video.domain}.mp4", (np.hstack(pair) for pair in pairs), fps=6)
    rows = {"base alone": base, "with all domains": with_experts}
    plot_tracking(
        [video.frames[t] for t in SHOWN_FRAMES],
        [f"frame {t}" for t in SHOWN_FRAMES],
        [truth[t] for t in SHOWN_FRAMES],
        {name: [id_maps[t] for t in SHOWN_FRAMES] for name, id_maps in rows.items()},
        output / f"tracking_{video.domain}.png",
        f"{video.domain}: a held-out video, its objects prompted by their masks on frame 0",
    )


def masks_agree(first: SamoeModel, second: SamoeModel, processor: ProcessorMixin, video: Video) -> bool:
    """Whether two models track a video to the same masks."""
    return bool((segment_video(first, processor, video)[0] == segment_video(second, processor, video)[0]).all())


def check_forgetting(
    base: SamoeModel, folders: Mapping[str, Path], shown: Mapping[str, Video], processor: ProcessorMixin
) -> dict[str, bool]:
    """Whether the last model tracks a video of each earlier look as the model did that knew the look first."""
    *earlier, last = folders
    final = SamoeModel.from_pretrained(folders[last])
    knowing: dict[str, Any] = {look: base for look in shown if look not in folders}
    knowing |= {domain: SamoeModel.from_pretrained(folders[domain]) for domain in earlier}
    return {look: masks_agree(model, final, processor, shown[look]) for look, model in knowing.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    if parsed.model is None:
        # More are hardly faster with so small a model, and wait for each other in vain where another process is busy.
        torch.set_num_threads(1)
    torch.manual_seed(parsed.seed)
    parsed.output.mkdir(parents=True, exist_ok=True)
    base = load_model(parsed)
    print(base.summary())
    size = base.config.image_size
    looks = [*(look for look in KNOWN_LOOKS if look not in parsed.domains), *parsed.domains]
    results = learn_domains(looks, size, parsed)

    folders = {domain: parsed.output / domain for domain in parsed.domains}
    final = SamoeModel.from_pretrained(folders[parsed.domains[-1]])
    processor = load_processor(str(folders[parsed.domains[-1]]), final)
    shown = {}
    for look in looks:
        videos = SyntheticVideos(NUM_TEST_VIDEOS, NUM_TEST_FRAMES, (size, size), domain=look, seed=2)
        shown[look] = max(videos, key=lambda video: len(video.object_ids))
        draw_look(final, processor, shown[look], parsed.output)
    same = check_forgetting(base, folders, shown, processor)

    print(f"\n{results_table(results)}")
    changed = [look for look, agrees in same.items() if not agrees]
    verdict = f"DIFFER for {', '.join(changed)}" if changed else "are the same to the bit"
    print(f"Masks of {', '.join(same)}, before and after what was learned later: {verdict}")
    print(f"Written: tracking_{looks[0]}.png, .mp4 and so on, masks/, and a model for each domain in {parsed.output}")


@plain_text
def plot_tracking(
    frames: Sequence[np.ndarray],
    names: Sequence[str],
    truth: Sequence[np.ndarray],
    tracked: Mapping[str, Sequence[np.ndarray]],
    path: str | Path,
    title: str,
) -> None:
    """Draws frames in a row, below them the true masks, and below those what was tracked, with the IoU of each object.

    Args:
        frames: (H, W, 3) uint8.
        names: of the frames.
        truth: a map of ids (H, W) for each frame, 0 for background.
        tracked: name of each further row -> its maps of ids.
        path: of the picture, such as a `.png`.
    """
    ids = sorted({int(i) for id_map in truth for i in np.unique(id_map) if i})
    rows = {"frame": [np.zeros_like(truth[0])] * len(frames), "truth": truth, **tracked}
    height = 0.3 + PANEL_INCHES * frames[0].shape[0] / frames[0].shape[1]
    figure = Figure(figsize=(max(PANEL_INCHES * len(frames) + 0.4, 7), height * len(rows) + 0.8), layout="constrained")
    grid = figure.subplots(len(rows), len(frames), squeeze=False)
    for axes_row, (row, id_maps) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(row, fontsize=9)
        for axes, frame, true, id_map in zip(axes_row, frames, truth, id_maps, strict=True):
            axes.imshow(overlay_masks(frame, id_map, max(len(frame), PANEL_PIXELS)))
            axes.set_xticks([])
            axes.set_yticks([])
            if row != "frame":
                axes.set_xlabel(_compared(id_map, None if row == "truth" else true, ids), fontsize=7.5, labelpad=2)
                if not id_map.any():
                    axes.text(0.5, 0.5, "empty", transform=axes.transAxes, fontsize=14, ha="center", bbox=LABEL_BOX)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    handles = [
        Patch(
            facecolor=np.array(object_color(i)) / 255,
            hatch=("///", "\\\\\\", "---", "|||")[(i - 1) // len(OBJECT_COLORS) % 4],
            label=f"object {i}",
        )
        for i in ids
    ]
    note = Patch(alpha=0, label=f"below: IoU of each object with the truth;{RIGHT} rightly empty")
    figure.legend(handles=[*handles, note], loc="outside lower center", ncols=min(len(handles), 6) + 1, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=DPI)


def _compared(id_map: np.ndarray, true: np.ndarray | None, ids: Sequence[int]) -> str:
    """The IoU of each object with the truth, if that is given, and which masks are empty; three objects in a line."""
    words = []
    for i in ids:
        mask, target = id_map == i, None if true is None else true == i
        if not mask.any():
            words.append(f"{i}: empty{RIGHT if target is not None and not target.any() else ''}")
        elif target is not None:
            words.append(f"{i}: {(mask & target).sum() / (mask | target).sum():.2f}")
    return "\n".join("  ".join(words[start : start + 3]) for start in range(0, len(words), 3))


if __name__ == "__main__":
    main()
