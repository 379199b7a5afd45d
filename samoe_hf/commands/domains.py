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
repository, if its owner put one there. `confirm` needs neither masks nor training. None changes what other domains do.

The changed model is written into the new folder `--output`, or with `--in-place` into MODEL, which must be a folder.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
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
    from samoe_hf.inference import load_tracker

    if getattr(parsed, "in_place", False) and not os.path.isdir(parsed.model):
        raise InputError(f"`--in-place` goes with a folder, and {parsed.model} is none; give `--output`.")
    if getattr(parsed, "output", None) is not None and parsed.action != "show" and parsed.output.exists():
        raise InputError(f"`--output` {parsed.output} exists; give a new folder, or `--in-place` to change MODEL.")
    with input_errors(parsed.model):
        model, processor = load_tracker(parsed.model, parsed.device, dtype=None)
    if parsed.action == "list":
        return print(find_on_hub(model, parsed.model) if parsed.hub else describe_domains(model))
    if parsed.action == "show":
        return show(model, parsed)
    print(change(model, processor, parsed))
    source, output = os.path.abspath(parsed.model), parsed.output or parsed.model
    # As it came: whole, or only what was trained.
    base = (model.origin.source or {}).get("name_or_path")
    with input_errors():
        model.save_pretrained(output, experts_only=base not in (source, parsed.model), processor=processor)
    print(f"{describe_domains(model)}\nWritten: the model in {output}")


def change(model: SamoeModel, processor: VideoProcessor, parsed: argparse.Namespace) -> str:
    """Changes the model as the command says, and says what was done."""
    from samoe_hf.surgery.domains import find_domain, merge_domains, remove_domain, rename_domain

    if parsed.action == "remove":
        remove_domain(model, parsed.name)
        return f"Removed {parsed.name}."
    if parsed.action == "rename":
        rename_domain(model, parsed.name, parsed.new_name)
        return f"{parsed.name} is now {parsed.new_name}."
    if parsed.action == "confirm":
        find_domain(model, parsed.domain)
        return confirm(model, processor, parsed.video, parsed.domain)
    with input_errors(parsed.other):
        other = type(model).from_pretrained(parsed.other, dtype=model.dtype).to(parsed.device)
    for name in parsed.domain or []:
        find_domain(other, name)
    for name in other.config.domain_names if parsed.domain else []:
        if name not in parsed.domain:
            remove_domain(other, name)
    if parsed.new_name is not None:
        if len(names := other.config.domain_names) != 1:
            raise InputError(
                f"`--as` names one domain, but {len(names)} are taken: {', '.join(names)}; see `--domain`."
            )
        rename_domain(other, names[0], parsed.new_name)
    return f"Added {', '.join(merge_domains(model, other))}, of {parsed.other}."


def confirm(model: SamoeModel, processor: VideoProcessor, path: Path, domain: str) -> str:
    """Tells the gate of a video, and says what it took it for before and after."""
    from samoe_hf.continual.fit_gate import confirm_video, decide_frame
    from samoe_hf.data.annotations import RleMasks
    from samoe_hf.data.schema import Video
    from samoe_hf.data.video_io import read_video
    from samoe_hf.evaluation.report import describe_choice

    with input_errors(str(path)):
        video = Video(path.stem, read_video(path), RleMasks({}, []))
        before = decide_frame(model, processor, video, 0)
        confirm_video(model, processor, domain, video)
        after = decide_frame(model, processor, video, 0)
    said = [describe_choice(one.domain or "base", one.confidence) for one in (before, after)]
    return f"{path}: the gate took it for {said[0]}; now for {said[1]}."


def describe_domains(model: SamoeModel) -> str:
    """A table of a model's domains."""
    from samoe_hf.evaluation.report import format_table
    from samoe_hf.model.domain_experts import domain_modules

    if not model.config.domains:
        return "The model has no domains."
    assert model.domain_gate is not None
    rows = []
    for domain, count in zip(model.config.domains, model.domain_gate.counts.tolist(), strict=True):
        tensors = [p for _, experts in domain_modules(model, domain["name"]) for p in experts.parameters()]
        megabytes = sum(p.numel() * p.element_size() for p in tensors) / 1e6
        rank = domain["lora_rank"] if domain["num_experts"] else "–"
        rows.append([domain["name"], domain["num_experts"], rank, f"{megabytes:.2f}", count])
    return format_table(["domain", "experts", "rank", "MB", "videos that the gate knows"], rows)


def find_on_hub(model: SamoeModel, source: str) -> str:
    """A table of the repositories of the Hub that have domains on the model's base."""
    from samoe_hf.evaluation.report import format_table
    from samoe_hf.hub.repository import find_domains

    base = (model.origin.source or {}).get("name_or_path") or source
    if os.path.isabs(base):
        raise InputError(f"The base of {source} is {base}, which only this machine has, so nobody else builds on it.")
    with input_errors():
        found = find_domains(base)
    if not found:
        return f"Nothing on the Hub has domains on {base}."
    rows = [[repository, ", ".join(names) or "cannot be read"] for repository, names in found.items()]
    return format_table(["repository", f"domains on {base}"], rows, left=(0, 1))


def show(model: SamoeModel, parsed: argparse.Namespace) -> None:
    """Writes the map of a model's domains."""
    from transformers.utils import cached_file

    from samoe_hf.model.weights_io import whole_file
    from samoe_hf.plots.domains import plot_domains

    gate = model.domain_gate
    known = [] if gate is None else [name for name, count in zip(gate.domains, gate.counts, strict=True) if count]
    if gate is None or not known:
        raise InputError(f"{parsed.model} has no domain that its gate knows.")
    examples = {}
    for name in known:
        for file in (f"examples/{name}.jpg", f"examples/{name}.png"):
            options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
            if (path := cached_file(parsed.model, file, **options)) is not None:
                examples[name] = path
                break
    with whole_file(parsed.output / MAP) as path:
        plot_domains(gate.domains, gate.distances_between(), examples, path)
    print(f"{describe_domains(model)}\nWritten: {parsed.output / MAP}")
