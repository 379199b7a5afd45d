"""What several commands have: options, and names of what they write."""

import argparse
import re
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from samoe_hf.errors import did_you_mean


class CommandParser(argparse.ArgumentParser):
    """Names the nearest known option beside an unknown one."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            hint = did_you_mean(unknown[0].partition("=")[0], known)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for `samoe NAME`, which shows the description as it is."""
    return CommandParser(
        prog=f"samoe {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_device_option(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds `--device`, by default the first GPU, or the CPU where there is none; returns its group, `machine`."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", type=usable_device, default=default, help="such as cuda:1 or cpu (%(default)s)")
    return machine


def add_original_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options that go with an original checkpoint; [`original_options`] gives their values."""
    group.add_argument("--experts", type=Path, metavar="FILE.pt", help="with an original .pt: the file of its experts")
    add_config_option(group)


def add_config_option(group: argparse._ArgumentGroup) -> None:
    """Adds `--config`, the YAML of an original checkpoint."""
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="with an original .pt: its YAML, needed for sizes other than Meta's",
    )


def original_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """What [`add_original_options`] was given, as arguments of `SamoeModel.from_pretrained`."""
    return {"experts": parsed.experts, "original_config": parsed.config}


def usable_device(name: str) -> torch.device:
    """A device of this machine by its name, as a type of `argparse`."""
    try:
        device = torch.device(name)
        torch.ones((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by the device and how it fails
        reason = str(error).split("\n")[0]
        raise argparse.ArgumentTypeError(f"{name!r} is no device that can be used here ({reason})") from error
    return device


def unique_names(names: Iterable[str]) -> list[str]:
    """Names for files or folders, all different: other characters become underscores, equal names get numbers."""
    unique: list[str] = []
    for name in names:
        name = re.sub(r"[^\w.+-]", "_", name)
        taken = {other.casefold() for other in unique}  # as some file systems tell names apart
        candidates = (name if number == 1 else f"{name}_{number}" for number in count(1))
        unique.append(next(candidate for candidate in candidates if candidate.casefold() not in taken))
    return unique


def start_processes(device: torch.device | None) -> PartialState:
    """The processes that share the work, of `accelerate launch` or `torchrun`, or this one alone.

    Args:
        device: that was asked for; by default the best there is.
    """
    is_cpu = device.type == "cpu" if device else not torch.accelerator.is_available()
    state = PartialState(cpu=is_cpu)  # without this it shares nothing among processes on CPUs
    if device and device.index is not None:
        state.device = device
    return state
