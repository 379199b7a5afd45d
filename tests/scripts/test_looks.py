"""The measure of the list of frames worth a look, on few and short videos."""

import runpy
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "scripts" / "looks.py"


@pytest.mark.slow
def test_it_writes_two_tables(tmp_path):
    main = runpy.run_path(str(PROGRAM))["main"]
    main(["--videos", "1", "--frames", "12", "--kinds", "late", "easy", "--seeds", "3", "4", "--output", str(tmp_path)])
    finds, corrections = (part.splitlines() for part in (tmp_path / "looks.md").read_text().split("\n\n"))
    assert [line.split(" | ")[0] for line in finds[2:]] == ["| hard", "| easy"]
    assert [line.split(" | ")[1] for line in corrections[2:]] == ["1", "3", "5"] * 2
