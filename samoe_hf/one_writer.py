"""One process at a time writes an output; others are told which one does."""

import json
import os
import re
import shlex
import socket
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from filelock import FileLock, Timeout

from samoe_hf.errors import InputError, input_errors
from samoe_hf.model.weights_io import can_lock
from samoe_hf.whole_files import clear_unfinished

# Data loader workers of a process that was killed hold its lock until they notice.
WAIT_FOR_WORKERS = 20
# Of a command, the Hub's tokens: by how they begin, and what follows an option of that name, which may be shortened.
TOKENS = re.compile(r"(--hub[_-]t\w*[= ]+|token['\"]?[=: ]+)(?:'[^']*'|[^\s,}'\"]+)|\bhf_\w+")


class OneWriter:
    """A context in which this process alone writes a file or folder, where files can be locked. It may enter again.

    What processes left that were killed while they wrote is removed, and told. Of several processes that `accelerate
    launch` or `torchrun` started, the first one stands for all. Where another process writes it, entering is an
    `InputError` that says which, where, and since when.

    Args:
        target: the output.
        option: what names it, for messages.
        inside: whether the lock lies in `target`, a folder that is made if need be; otherwise beside it.
    """

    def __init__(self, target: str | Path, option: str = "`--output`", inside: bool = True):
        self.target, self.option = Path(target), option
        self.cleared: list[str] = []
        # A folder that is made from here on, be it by others such as Trainer, does not stay empty.
        self._depth, self._is_new = 0, inside and not self.target.exists()
        # Trainer does not upload names that begin with an underscore.
        places = self.target / "_writer.lock", self.target.parent / f".{self.target.name}.writer.lock"
        self._file, self._elsewhere = places if inside else places[::-1]
        self._about, self._lock = self._file.with_suffix(".json"), FileLock(self._file)

    def __enter__(self) -> "OneWriter":
        if self._depth == 0 and is_first_process():
            try:
                with input_errors(f"{self.option} {self.target} cannot be written"):
                    self._acquire()
                    self.cleared = clear_unfinished(self.target)
            except BaseException:
                if self._lock.is_locked:
                    self._release()
                raise
            if self.cleared:
                print(f"{self.target}: cleared what a stopped process left there, {len(self.cleared)} names.")
        self._depth += 1
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0 and is_first_process():
            self._release()

    def _release(self) -> None:
        with suppress(OSError):  # Windows removes no open file
            self._about.unlink(missing_ok=True)
            self._file.unlink()
        self._lock.release()
        if self._is_new:
            with suppress(OSError):  # something was written, or it is gone
                self.target.rmdir()

    def _acquire(self) -> None:
        start = time.monotonic()
        while True:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            if not can_lock(self._file):
                break
            number = self._file.stat().st_ino
            try:
                self._lock.acquire(timeout=0)
                if self._elsewhere.exists() and can_lock(self._elsewhere):
                    with FileLock(self._elsewhere, timeout=0):  # of a command that locks it the other way
                        pass
            except Timeout:
                writer = self._writer()
                if self._lock.is_locked:
                    self._release()
                is_alive = writer.get("host") != socket.gethostname() or psutil.pid_exists(writer["pid"])
                if is_alive or time.monotonic() > start + WAIT_FOR_WORKERS:
                    raise InputError(
                        f"{self.target} is being written by another process: {_describe(writer)}. Wait until it ends, "
                        f"or choose another {self.option}."
                    ) from None
                time.sleep(0.1)
                continue
            if self._file.exists() and self._file.stat().st_ino == number:
                break
            self._lock.release()  # of a file that the one before had just removed
        command = TOKENS.sub(r"\1…", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "command": command[:300]}
        self._about.write_text(json.dumps(about), encoding="utf-8")

    def _writer(self) -> dict[str, Any]:
        """What the other process says of itself; it may just begin, or end."""
        about = self._elsewhere.with_suffix(".json") if self._lock.is_locked else self._about
        for _ in range(20):
            try:
                return json.loads(about.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                time.sleep(0.05)
        return {}


def is_first_process() -> bool:
    """Whether this is the first of the processes that `accelerate launch` or `torchrun` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _describe(writer: dict[str, Any]) -> str:
    if not writer:
        return "one that does not say which"
    since = datetime.fromtimestamp(writer["since"])
    return f"`{writer['command']}` (process {writer['pid']} on {writer['host']}, since {since:%Y-%m-%d %H:%M:%S})"
