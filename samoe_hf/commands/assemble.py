"""Assemble LoRAs that were trained apart with PEFT, each on its domain, into one model with a domain for each.

    samoe assemble BASE LORA_A LORA_B --dataset A.yaml --dataset B.yaml --output DIR
    samoe assemble BASE blobs=LORA_A stripes=LORA_B --dataset RUN.yaml --output DIR

Nothing is trained. A gate learns to recognize the domains from some of their videos, and gives each video its domain's
LoRA; one that looks like none of them gets the base. `--dataset` is a folder of videos, one dataset as in a run,
`{kind: davis, root: DAVIS}`, or a run's YAML, for the videos of its `train_data`. It is given once for each LoRA, in
order; or once for all, and then a LoRA takes the videos of the domain that it is named after, by NAME= or as its folder
is. `NAME=` with nothing behind it is a domain on which the base is good as it is.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from samoe_hf.errors import InputError, input_errors

from .options import add_device_option, add_original_options, add_output_option, command_parser, videos_of_run

if TYPE_CHECKING:
    from samoe_hf.data.schema import Video


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("assemble", __doc__)
    model = parser.add_argument_group("model")
    model.add_argument(
        "base", metavar="BASE", help="the model that the LoRAs were trained on: folder, Hub id or original .pt"
    )
    model.add_argument("loras", nargs="+", metavar="[NAME=]LORA", help="folder or Hub id of a PEFT adapter")
    add_original_options(model, experts=False)
    videos = parser.add_argument_group("videos")
    help_text = "those of a run's `train_data`, or of one dataset; once for all LoRAs, or once for each"
    kinds = "FOLDER|RUN.yaml|{kind: ...}"
    videos.add_argument("--dataset", action="append", required=True, metavar=kinds, help=help_text)
    add_output_option(parser, "folder for the model; new or empty")
    add_device_option(parser)
    return parser.parse_args(arguments)


@input_errors()
def load_domains(dataset: str) -> dict[str, list[Video]]:
    """Domain -> its videos, of a run's `train_data` or of one dataset."""
    from samoe_hf.data.configs import names_config
    from samoe_hf.data.registry import parse_yaml, videos_from_entry

    if names_config(dataset):
        parts = videos_of_run(dataset, "train_data")
    else:
        source = dataset if os.path.exists(dataset) else parse_yaml(dataset, "`--dataset`")
        parts = [videos_from_entry(source, "`--dataset`")]
    domains: dict[str, list[Video]] = {}
    for videos in parts:
        domains.setdefault(videos[0].domain, []).extend(videos)
    if not domains:
        raise InputError(f"`--dataset` {dataset} names no dataset in its `train_data`.")
    return domains


def match_domains(
    loras: Sequence[str], datasets: Sequence[str]
) -> tuple[dict[str, str | None], dict[str, list[Video]]]:
    """Name of each LoRA -> the LoRA, and -> its videos."""
    named: dict[str, str | None] = {}
    for text in loras:
        name, is_named, source = text.rpartition("=")
        name = name if is_named else Path(source).name
        if name in named:
            raise InputError(f"Two LoRAs have the name {name!r}; give each its own, NAME=LORA.")
        named[name] = source or None
    found = [load_domains(dataset) for dataset in datasets]
    if len(found) == len(named) > 1:
        return named, {name: list(chain(*of.values())) for name, of in zip(named, found, strict=True)}
    if len(found) != 1:
        raise InputError(f"`--dataset` must be given once, or once for each of {len(named)} LoRAs, got {len(found)}.")
    if len(named) == 1 and len(found[0]) == 1:
        return named, dict(zip(named, found[0].values(), strict=True))
    for name in named:
        if name not in found[0]:
            domains = ", ".join(map(repr, found[0]))
            raise InputError(f"{name!r} is none of the dataset's domains ({domains}); name each LoRA by DOMAIN=LORA.")
    return named, {name: found[0][name] for name in named}


def run(parsed: argparse.Namespace) -> None:
    from samoe_hf.continual.assemble import assemble
    from samoe_hf.inference import load_processor
    from samoe_hf.one_writer import OneWriter
    from samoe_hf.whole_files import new_folder

    loras, videos = match_domains(parsed.loras, parsed.dataset)
    with OneWriter(parsed.output, inside=False), input_errors(), new_folder(parsed.output) as folder:
        options = {} if parsed.config is None else {"original_config": parsed.config}
        model = assemble(parsed.base, loras, videos, device=parsed.device, **options)
        model.save_pretrained(folder, processor=load_processor(parsed.base, model))
    assert model.domain_gate is not None
    print("Domains, and videos that the gate knows them by:")
    for name, count in zip(model.config.domain_names, model.domain_gate.counts.tolist(), strict=True):
        print(f"  {name:20s} {count}")
    print(f"Written: the model and its processor in {parsed.output}")
