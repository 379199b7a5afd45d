"""The exception that tells a user what to change, and the name that was probably meant."""

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """An argument, an option or a file cannot be used. The message names it, its value and what was expected.

    The command line shows it as one line, as it does a missing file and a full disk. Every other exception keeps its
    traceback.
    """


@contextmanager
def input_errors(subject: str = "") -> Iterator[None]:
    """Around what opens files or asks the Hub: what a user can mend becomes an [`InputError`] of the same message.

    That is a file that is missing or cannot be read or written, a Hub that is not reached or refuses, and a package
    that is not installed. The subject, such as what is loaded, is put before a message that does not name it.
    """
    try:
        yield
    except Exception as error:
        # huggingface_hub lets errors of its network library pass, whose package depends on its version.
        kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
        message = str(error)
        if kinds & {"httpx.TransportError", "httpx2.TransportError"}:
            message = f"The Hugging Face Hub was not reached: {message}"
        elif not (isinstance(error, OSError | ImportError) or "huggingface_hub.HFValidationError" in kinds):
            raise
        raise InputError(message if subject in message else f"{subject}: {message}") from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, says that a disk or a quota is full."""
    words = ("No space left on device", "inline_container", "PytorchStreamWriter")  # of torch.save, which says no more
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, OSError | RuntimeError) and any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def file_in_the_way(folder: str | os.PathLike) -> Path | None:
    """The file for which a folder cannot be made: it has its name, or that of one that it would lie in."""
    folder = Path(os.path.abspath(folder))
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return None if nearest.is_dir() else nearest


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, else all of them if they are few."""
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, n=1)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    return f"; there are: {', '.join(known)}" if 0 < len(known) <= 40 else ""
