"""Commands that are killed at random moments, or started twice at once, end with what an undisturbed one writes."""

import os
import subprocess
import sys

import pytest

from helpers.processes import ENVIRONMENT
from helpers.reference import ROOT

KILLS, PAIRS = (int(os.environ.get(name, number)) for name, number in (("SAMOE_KILLS", "25"), ("SAMOE_PAIRS", "5")))


@pytest.mark.slow
def test_kills_and_pairs_of_commands_change_no_result(tmp_path):
    program = ROOT / "tests" / "programs" / "kill_commands.py"
    words = [sys.executable, program, tmp_path / "runs", "--kills", KILLS, "--pairs", PAIRS]
    done = subprocess.run(list(map(str, words)), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
