"""Tracking of objects that read different memories, beside that of objects that read the same ones.

python scripts/benchmarks/selections.py --objects 4 16
"""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from measure import Measurement, at_least, autocast, benchmark_parser, prepare, synchronize, to_markdown, write_results
from samoe_hf import SamoeModel, VideoSession

NUM_FRAMES = 40
# From here on every object reads one conditioning frame and six others; before, those begun last read fewer pointers.
FULL = 32
PARTS = ("unequally many memories", "equally many")
EQUAL = "all begin on one frame"


def frames_in_turn(model: SamoeModel, frames: Tensor, starts: Sequence[int], selection: str) -> Iterator[float]:
    """Seconds of each frame, of objects that begin on the frames `starts`, each with a point."""
    session = VideoSession(inference_device=model.device, dtype=model.dtype, memory_selection=selection)
    session.video_height = session.video_width = frames.shape[-1]
    for frame in frames:
        session.add_new_frame(frame)
    session.keep_frames = len(frames)
    generator = torch.Generator().manual_seed(0)
    for object_id, start in enumerate(starts):
        point = torch.rand(1, 1, 1, 2, generator=generator) * frames.shape[-1]
        row = session.obj_id_to_idx(object_id)
        labels = torch.ones(1, 1, 1, dtype=torch.int32)
        session.add_point_inputs(row, start, {"point_coords": point, "point_labels": labels})
        session.obj_with_new_inputs.append(object_id)
    begin = time.perf_counter()
    for _ in model.propagate_from_prompts_iterator(session):
        synchronize(model.device)
        yield time.perf_counter() - begin
        begin = time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--objects", type=at_least(1), nargs="+", default=[4, 16], help="(%(default)s)")
    parsed = parser.parse_args(arguments)
    config, dtype = prepare(parsed)
    torch.manual_seed(0)
    model = SamoeModel(config).to(parsed.device).eval()
    frames = torch.randn(NUM_FRAMES, 3, config.image_size, config.image_size).to(parsed.device)
    results = []
    for count in parsed.objects:
        contenders = {
            EQUAL: ([15] * count, "recent"),
            "each begins on its own frame": ([15 - index % 16 for index in range(count)], "recent"),
            "score": ([15 - index % 16 for index in range(count)], "score"),
            "distractor": ([15 - index % 16 for index in range(count)], "distractor"),
        }
        found = {name: [Measurement(f"{count} objects, {part}", name) for part in PARTS] for name in contenders}
        for repeat in range(parsed.repeats + 1):
            with torch.inference_mode(), autocast(parsed.device, dtype):
                # In turns, frame by frame: what else the machine does slows all of them.
                turns = {name: frames_in_turn(model, frames, *what) for name, what in contenders.items()}
                skip = {name: 15 - min(starts) for name, (starts, _) in contenders.items()}
                for name, turn in turns.items():
                    for _ in range(skip[name]):
                        next(turn)
                for t in range(15, NUM_FRAMES):
                    for name, turn in turns.items():
                        seconds = next(turn)
                        if repeat and t > 15:
                            found[name][t >= FULL].seconds.append(seconds)
        results += [one for parts in found.values() for one in parts]
    title = f"Tracking with memories of each object's own, {dtype}"
    write_results(parsed.output, "selections", title, results, to_markdown(results, EQUAL, "frame"), parsed.device)


if __name__ == "__main__":
    main()
