"""The exception that tells a user what to change, and the name that was probably meant."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An argument, an option or a file cannot be used. The message names it, its value and what was expected.

    The command line shows it as one line. Every other exception keeps its traceback.
    """


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, else all of them if they are few."""
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, n=1)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    return f"; there are: {', '.join(known)}" if 0 < len(known) <= 40 else ""
