"""`samoe COMMAND …`: the table of commands, and the one place where a user's mistake becomes a line of text."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from transformers.utils.logging import disable_progress_bar

from samoe_hf import __version__

COMMANDS = {
    "track": "track objects through a video, or through all videos of a dataset",
    "app": "open a page that tracks, corrects, shows the experts, and learns",
    "data": "check a dataset: its videos, objects, and what is likely a mistake",
    "train": "fine-tune a model on clips, as a YAML says",
    "adapt": "add a domain to a model: train experts for it, and leave all else as it is",
    "evaluate": "say how good models are on a dataset",
    "experts": "show what a model's experts do",
    "convert": "convert checkpoints of SAM 2 and SAM2-MoE, and back; upload them",
    "assemble": "make one model of LoRAs that were trained apart",
}

# Arguments of Python in messages -> what they are called on the command line.
OPTIONS = {
    "`original_config`": "`--config`",
    "`experts`": "`--experts`",
    "`ignore_mismatched_sizes=True`": "`samoe train --ignore_mismatched_sizes`",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `samoe COMMAND ARGUMENTS`; `sys.argv` if no arguments are given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    table = "\n".join(f"  {name:10s} {description}" for name, description in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="samoe",
        usage="samoe COMMAND ...",
        description="SAM 2 video with a mixture of LoRA experts.",
        epilog=f"commands:\n{table}\n\n`samoe COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("--version", action="version", version=f"samoe_hf {__version__}")
    command = parser.parse_args(arguments[:1]).command
    run_command(command, arguments[1:])


def run_command(name: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a command; errors that a user or the network can cause end the process with exit status 1 and one
    line, `error: …`."""
    command = import_module(f"samoe_hf.commands.{name}")
    disable_progress_bar()  # of loading and saving, beside the command's own
    try:
        command.main(arguments)
    except Exception as error:
        if not (isinstance(error, ValueError | OSError | ImportError) or _is_of_network(error)):
            raise
        message = " ".join(str(error).split())
        if _is_of_network(error):
            message = f"The Hugging Face Hub was not reached: {message}"
        for argument, option in OPTIONS.items():
            message = message.replace(argument, option)
        sys.exit(f"error: {message}")


def _is_of_network(error: Exception) -> bool:
    """Whether the Hub was not reached. Its library lets errors of httpx pass, whose package depends on its version."""
    return any(t.__name__ == "TransportError" and t.__module__.startswith("httpx") for t in type(error).__mro__)


if __name__ == "__main__":
    main()
