"""Programs of tests in two processes, as torchrun starts them, and what is waited for."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

from helpers.reference import ROOT

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_two(program: str, *arguments: object, launch: list[str] = LAUNCH) -> None:
    """Runs a file of `tests/programs` in two processes, or as `launch` says; fails if it fails."""
    command = [*launch, ROOT / "tests" / "programs" / program, *arguments]
    subprocess.run([str(part) for part in command], check=True, env=ENVIRONMENT, cwd=ROOT)


def wait_until(holds: Callable[[], bool], seconds: float = 30, said: Callable[[], str] = str) -> None:
    """Waits until something holds; fails, with what is said then, if it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, said()
        time.sleep(0.2)
