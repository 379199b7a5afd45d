"""The exception that tells a user what to change."""


class InputError(ValueError):
    """An argument, an option or a file cannot be used. The message names it, its value and what was expected.

    The command line shows it as one line. Every other exception keeps its traceback.
    """
