"""Programs of tests in two processes, as torchrun starts them."""

import os
import subprocess
import sys

from helpers.reference import ROOT

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_two(program: str, *arguments: object, launch: list[str] = LAUNCH) -> None:
    """Runs a file of `tests/programs` in two processes, or as `launch` says; fails if it fails."""
    command = [*launch, ROOT / "tests" / "programs" / program, *arguments]
    subprocess.run([str(part) for part in command], check=True, env=ENVIRONMENT, cwd=ROOT)
