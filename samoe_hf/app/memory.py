"""Memory that was freed, given back to the machine."""

import ctypes
import ctypes.util
import gc


def give_back_memory() -> None:
    """Gives back what was freed, where the C library can be told to.

    The C library of Linux keeps freed memory for each of the server's threads, and a video leaves much of it in many.
    """
    gc.collect()
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is not None:
        trim(0)
