"""The comparison of memory selections, on few and short videos."""

import runpy
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "scripts" / "selections.py"


@pytest.mark.slow
def test_it_writes_a_table_and_pictures(tmp_path):
    main = runpy.run_path(str(PROGRAM))["main"]
    main(["--videos", "2", "--frames", "12", "--seeds", "3", "--output", str(tmp_path)])
    lines = (tmp_path / "selections.md").read_text().splitlines()
    assert len(lines) == 2 + 3 * 6 and "| easy" in lines[-1] and "distractor" in lines[-1]
    assert all(picture.stat().st_size > 10_000 for picture in tmp_path.glob("*.jpg"))
