"""See, add, remove and rename the domains of a model, and tell its gate of one more video of a domain.

    samoe domains list MODEL
    samoe domains list MODEL --hub
    samoe domains show MODEL --output outputs/domains
    samoe domains add MODEL someone/ultrasound --output DIR
    samoe domains add MODEL FOLDER --domain night --as driving-at-night --in-place
    samoe domains remove MODEL night --output DIR
    samoe domains rename MODEL night driving-at-night --in-place
    samoe domains confirm MODEL heart.mp4 --domain ultrasound --in-place

`list --hub` finds repositories on the Hub with domains on the same base. `add` takes domains of another model, which
must be on the very same base and of other names, with what its gate knows of them. `show` draws how near domains are to
each other for the gate; at a domain stands the picture `examples/NAME.jpg` (or `.png`) of the model's folder or
repository, if its owner put one there. `confirm` needs neither masks nor training, and a video that the domain does not
know yet: it would count twice. None changes what other domains do.

The changed model is written into the new folder `--output`, or with `--in-place` into MODEL, which must be a folder.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from samoe_hf.errors import InputError, input_errors

from .options import add_device_option, command_parser

if TYPE_CHECKING:
    from samoe_hf.model.modeling_samoe import SamoeModel
    from samoe_hf.model.processing_samoe import VideoProcessor

MAP = "domains.png"
SOURCES = "a SamoeModel: folder or Hub id"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("domains", __doc__)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, help="one of these:")

    def add(name: str, help_text: str, changes: bool = True) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=help_text, description=help_text)
        action.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        action.add_argument("model", metavar="MODEL", help=SOURCES)
        if changes:
            target = action.add_mutually_exclusive_group(required=True)
            target.add_argument("--output", type=Path, metavar="DIR", help="new folder for the changed model")
            target.add_argument("--in-place", action="store_true", help="change the folder MODEL itself")
        add_device_option(action)
        return action

    listed = add("list", "names, experts, and how many videos the gate knows each by", changes=False)
    listed.add_argument("--hub", action="store_true", help="repositories of the Hub with domains on the model's base")
    shown = add("show", "draw how near domains are to each other for the gate", changes=False)
    shown.add_argument("--output", type=Path, required=True, metavar="DIR", help=f"folder for {MAP}")
    added = add("add", "take domains of another model on the same base")
    added.add_argument("other", metavar="OTHER", help=SOURCES)
    added.add_argument("--domain", action="append", metavar="NAME", help="only this one; may be repeated")
    added.add_argument("--as", dest="new_name", metavar="NAME", help="another name for it, where it is one")
    add("remove", "take a domain's experts away, and what the gate knows of it").add_argument("name", metavar="NAME")
    renamed = add("rename", "give a domain another name")
    renamed.add_argument("name", metavar="NAME")
    renamed.add_argument("new_name", metavar="NEW_NAME")
    confirmed = add("confirm", "tell the gate of one more video of a domain")
    confirmed.add_argument("video", type=Path, metavar="VIDEO", help="a video file or a folder of frames")
    confirmed.add_argument("--domain", required=True, metavar="NAME", help="the domain that it is of")
    return parser.parse_args(arguments)


def run(parsed: argparse.Namespace) -> None:
    from samoe_hf.one_writer import OneWriter

    in_place = getattr(parsed, "in_place", False)
    if in_place and not os.path.isdir(parsed.model):
        raise InputError(f"`--in-place` goes with a folder, and {parsed.model} is none; give `--output`.")
    if getattr(parsed, "output", None) is not None and parsed.action != "show" and parsed.output.exists():
        raise InputError(f"`--output` {parsed.output} exists; give a new folder, or `--in-place` to change MODEL.")
    changes = parsed.action not in ("list", "show")
    # From before the model is read, or of two processes that change it the later one undoes what the other did.
    where = (parsed.model, "MODEL") if in_place else (getattr(parsed, "output", ""),)
    with OneWriter(*where, inside=in_place) if changes else nullcontext():
        act(parsed)


def act(parsed: argparse.Namespace) -> None:
    """Does what the command says, while no other process writes the model."""
    from samoe_hf.continual import manage_domains as domains
    from samoe_hf.evaluation.report import format_table
    from samoe_hf.inference import load_tracker
    from samoe_hf.plots.masks import DPI
    from samoe_hf.whole_files import whole_file

    with input_errors(parsed.model):
        if parsed.action in ("list", "show"):
            processor, (model, config) = None, domains.load_without_experts(parsed.model)
        else:
            options = domains.without_experts_of(parsed.model, parsed.name) if parsed.action == "remove" else {}
            config, (model, processor) = None, load_tracker(parsed.model, parsed.device, dtype=None, **options)
    if parsed.action == "list" and parsed.hub:
        base, found = domains.find_on_hub(model, parsed.model)
        rows = [[repository, ", ".join(names) or "cannot be read"] for repository, names in found.items()]
        table = format_table(["repository", f"domains on {base}"], rows, left=(0, 1))
        return print(table if rows else domains.NOTHING_FOUND.format(base))
    written = ""
    if parsed.action == "show":
        figure = domains.draw_map(model, partial(domains.find_example, parsed.model))
        refused = input_errors(f"`--output` {parsed.output} cannot be written")
        with refused, whole_file(parsed.output / MAP) as path:
            figure.savefig(path, dpi=DPI)
        written = f"\nWritten: {parsed.output / MAP}"
    elif processor is not None:
        names = model.config.domain_names
        origins = {name: (parsed.model, name) for name in names}
        done = change(model, processor, parsed, origins)
        output = parsed.output or parsed.model
        with input_errors():
            found = {name: domains.find_example(*origins[name]) for name in model.config.domain_names}
            examples = {name: path for name, path in found.items() if path is not None}
            domains.save_as_it_came(model, processor, parsed.model, output, examples)
            for name in set(names).difference(found) if parsed.in_place else ():
                if (picture := domains.find_example(parsed.model, name)) is not None:
                    os.remove(picture)
        print(done)
        written = f"\nWritten: the model in {output}"
    rows = domains.list_domains(model, config)
    print((format_table(domains.HEADINGS, rows) if rows else "The model has no domains.") + written)


def change(
    model: SamoeModel, processor: VideoProcessor, parsed: argparse.Namespace, origins: dict[str, tuple[str, str]]
) -> str:
    """Changes the model as the command says, and says what was done; `origins`: where each domain is from, and its name
    there."""
    from samoe_hf.continual.manage_domains import confirm, load_for_domains, take_domains
    from samoe_hf.data.video_io import read_video
    from samoe_hf.surgery.domains import find_domain, remove_domain, rename_domain

    if parsed.action == "remove":
        remove_domain(model, parsed.name)
        return f"Removed {parsed.name}."
    if parsed.action == "rename":
        rename_domain(model, parsed.name, parsed.new_name)
        origins[parsed.new_name] = origins.pop(parsed.name)
        return f"{parsed.name} is now {parsed.new_name}."
    if parsed.action == "confirm":
        find_domain(model, parsed.domain)
        with input_errors(str(parsed.video)):
            return f"{parsed.video}: {confirm(model, processor, read_video(parsed.video), parsed.domain)}"
    with input_errors(parsed.other):
        other = load_for_domains(parsed.other, parsed.domain or (), model)
    taken = take_domains(model, other, parsed.domain or (), parsed.new_name)
    origins.update({name: (parsed.other, theirs) for name, theirs in taken.items()})
    return f"Added {', '.join(taken)}, of {parsed.other}."
