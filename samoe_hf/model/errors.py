"""The exception that tells a user what to change; the package's own, where the package is installed."""

try:
    from samoe_hf.errors import InputError  # pyright: ignore[reportAssignmentType]  # it is one class or the other
except ImportError:  # this file is part of a repository's remote code

    class InputError(ValueError):  # type: ignore[no-redef]
        """An argument or a file cannot be used. The message names it, its value and what was expected."""


__all__ = ["InputError"]
