"""`samoe COMMAND …`: the table of commands, and the one place where a user's mistake becomes a line of text."""

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import TracebackType

from samoe_hf import __version__
from samoe_hf.data.configs import expand_home
from samoe_hf.errors import InputError, is_disk_full

COMMANDS = {
    "track": "track objects through a video",
    "label": "track the objects of all videos of a dataset, and write their masks",
    "app": "open a page that tracks, corrects, shows the experts, and learns",
    "data": "check a dataset: its videos, objects, and what is likely a mistake",
    "train": "fine-tune a model on clips, as a YAML says",
    "adapt": "add a domain to a model: train experts for it, and leave all else as it is",
    "domains": "list, show, find, add, remove and rename domains, and tell the gate of one more video",
    "evaluate": "say how good models are on a dataset",
    "experts": "show what a model's experts do",
    "convert": "convert checkpoints of SAM 2 and SAM2-MoE, and back; upload them",
    "export": "write a model for ONNX or torch.export, and a tracker that needs no PyTorch",
    "assemble": "make one model of LoRAs that were trained apart",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `samoe COMMAND ARGUMENTS`; `sys.argv` if no arguments are given."""
    for stream in (sys.stdout, sys.stderr):
        # Not of a stream that was closed, or whose file was exchanged for a pipe.
        with suppress(OSError, ValueError):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # "?" for letters that a terminal does not have
    arguments = expand_home(list(sys.argv[1:] if arguments is None else arguments))
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
    run_command(parser.parse_args(arguments[:1]).command, arguments[1:])


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Parses the arguments of a command and runs it.

    An [`InputError`], a missing file and a full disk end the process with exit status 1 and one line, `error: …`, or
    with a traceback if `--traceback` is among the arguments; Ctrl-C ends it with `stopped`. Other errors always have
    their traceback.
    """
    command = import_module(f"samoe_hf.commands.{name}")
    if "--traceback" not in arguments:
        sys.excepthook = _say_stopped
    try:
        parsed = command.parse_arguments(arguments)
        quiet_libraries()  # not needed for a help text, and slow
        command.run(parsed)
    except Exception as error:
        is_full = is_disk_full(error) and "the disk is full" not in str(error)
        if "--traceback" in arguments or not (is_full or isinstance(error, InputError | FileNotFoundError)):
            raise
        advice = " Nothing that was there is lost. Make room, and run the command again." if is_full else ""
        subject = "the disk is full: " if is_full else ""
        # Of a data loader's worker, the text ends a traceback.
        words = str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].split()
        sys.exit(f"error: {subject}{' '.join(words)}{advice}")
    finally:
        # Threads of `torchrun`'s group of processes may abort one that ends without leaving it.
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def quiet_libraries() -> None:
    """Turns off warnings of torchao and bitsandbytes, which others import, and bars of loading and saving."""
    for name in ("torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _say_stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A hook for what ends the process: of Ctrl-C a traceback would tell nothing. It is by SIGINT all the same."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    main()
