"""Show what a model's experts do: their use by layer, domain and object, and where in the image each is chosen.

    samoe experts MODEL --dataset davis --root DAVIS --split val --output outputs/experts
    samoe experts MODEL --dataset RUN.yaml        # the videos of its `eval_data`, of several domains

Objects are prompted with their masks on the first frame that shows them, and tracked. Tables, `statistics.json` and
pictures are written to the output folder; routing maps, as a strip of frames and a video, for one video of each domain.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from samoe_hf.errors import InputError

from . import options

if TYPE_CHECKING:
    from samoe_hf.analysis.usage import ExpertUsage
    from samoe_hf.data.schema import Video


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.command_parser("experts", __doc__)
    options.add_model_option(parser)
    options.add_dataset_options(parser)
    routing = parser.add_argument_group("routing")
    help_text = "video to map, by number or id; may be repeated; the first of each domain"
    routing.add_argument("--routing-video", action="append", default=[], metavar="N|ID", help=help_text)
    routing.add_argument("--routing-module", metavar="NAME", help="layer to map; the last cross attention's q_proj")
    routing.add_argument("--routing-object", type=int, metavar="ID", help="object to map; the first of its video")
    help_text = "experts that a smaller share of the tokens choose are dead (%(default)s)"
    routing.add_argument("--dead-share", type=float, default=0.001, metavar="SHARE", help=help_text)
    output = options.add_output_option(parser, "folder (%(default)s)", "outputs/experts")
    output.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run there")
    # Compiled parts run uncompiled where routers are watched.
    options.add_tracking_options(parser, compiles=False)
    return parser.parse_args(arguments)


def choose_videos(videos: list[Video], chosen: list[str], object_id: int | None) -> list[Video]:
    """The videos that are named by id or number, each of which must have the object."""
    from samoe_hf.data.frames import one_form

    found = []
    for text in chosen:
        matches = [video for video in videos if one_form(video.video_id) == one_form(text)]
        if not matches and text.isdigit() and int(text) < len(videos):
            matches = [videos[int(text)]]
        if not matches:
            raise InputError(f"`--routing-video` must be an id or a number below {len(videos)}, got {text!r}.")
        found += [video for video in matches if all(video is not other for other in found)]
    for video in found:
        if object_id not in (None, *video.object_ids):
            raise InputError(
                f"`--routing-object` {object_id} is not in {video.video_id}, which has {video.object_ids}."
            )
    if object_id is not None and not any(object_id in video.object_ids for video in videos):
        raise InputError(f"`--routing-object` {object_id} is in none of the videos.")
    return found


def first_of_each_domain(videos: list[Video], usage: ExpertUsage, module: str, object_id: int | None) -> list[Video]:
    """Of each domain, the first video in which the module ran, for the object if one is given."""
    from samoe_hf.model.domain_experts import module_layer

    # A layer that runs once for all objects has no object of its own.
    all_sources = [source for name, sums in usage.sums.items() if module_layer(name) == module for source in sums]
    sources = [s for s in all_sources if None in (object_id, s.object_id) or s.object_id == object_id]
    ran = {source[:2] for source in sources}
    found = [v for v in videos if (v.domain, v.video_id) in ran and object_id in (None, *v.object_ids)]
    return list({video.domain: video for video in reversed(found)}.values())[::-1]


def print_usage(usage: ExpertUsage, dead_share: float) -> None:
    """Prints a line for each module."""
    import pandas as pd

    from samoe_hf.analysis.routing import short_name

    print("Entropies: 1 is even. load_max: of the most chosen expert, 1 is even. domain_information: in bits.")
    table = usage.statistics(dead_share=dead_share).rename(index=short_name)
    table = table[
        ["usage_entropy", "router_entropy", "load_max", "domain_information", "mean_similarity", "dead_experts"]
    ]
    table["dead_experts"] = [" ".join(map(str, dead)) or "-" for dead in table["dead_experts"]]
    with pd.option_context("display.width", 200, "display.max_rows", None, "display.float_format", "{:.3f}".format):
        print(table.rename_axis(None).to_string(na_rep="-"))


def run(parsed: argparse.Namespace) -> None:
    """Tracks the videos, and prints, draws and writes what the experts did."""
    from samoe_hf.analysis.routing import routing_maps, routing_module
    from samoe_hf.analysis.usage import expert_usage
    from samoe_hf.one_writer import OneWriter

    if not 0 <= parsed.dead_share <= 1:
        raise InputError(f"`--dead-share` must be from 0 to 1, got {parsed.dead_share}.")
    if (parsed.output / "statistics.json").exists() and not parsed.overwrite:
        raise InputError(f"`--output` {parsed.output} has an earlier run's files; give another, or `--overwrite`.")
    videos = options.open_dataset(parsed).videos()
    chosen = choose_videos(videos, parsed.routing_video, parsed.routing_object)
    model, processor = options.load_model(parsed, parsed.device)
    module = routing_module(model, parsed.routing_module)
    with OneWriter(parsed.output):
        usage = expert_usage(model, videos, processor)
        print_usage(usage, parsed.dead_share)
        files = []
        if module is None:
            print("No routing maps: no layer with experts has image positions for tokens.")
        else:
            chosen = chosen or first_of_each_domain(videos, usage, module, parsed.routing_object)
            names = options.unique_names(f"routing_{video.domain}_{video.video_id}" for video in chosen)
            for video, name in zip(chosen, names, strict=True):
                maps = routing_maps(model, video, processor, module)
                files += maps.save(parsed.output / name, parsed.routing_object)
        files = usage.save(parsed.output, parsed.dead_share) + files  # last: `statistics.json` says that all is there
    print(f"Written: {', '.join(file.name for file in files)} in {parsed.output}")
