"""The measures of frames worth a look and of memory selections, on few and short videos."""

import runpy

import pytest

from helpers.reference import ROOT


def run(name, *words, output):
    main = runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["main"]
    main([*words, "--frames", "12", "--output", str(output)])
    return (output / f"{name}.md").read_text()


@pytest.mark.slow
def test_looks_writes_two_tables(tmp_path):
    text = run("looks", "--videos", "1", "--kinds", "late", "easy", "--seeds", "3", "4", output=tmp_path)
    finds, corrections = (part.splitlines() for part in text.split("\n\n"))
    assert [line.split(" | ")[0] for line in finds[2:]] == ["| hard", "| easy"]
    assert [line.split(" | ")[1] for line in corrections[2:]] == ["1", "3", "5"] * 2


@pytest.mark.slow
def test_selections_writes_a_table_and_pictures(tmp_path):
    lines = run("selections", "--videos", "2", "--seeds", "3", output=tmp_path).splitlines()
    assert len(lines) == 2 + 3 * 6 and "| easy" in lines[-1] and "distractor" in lines[-1]
    assert all(picture.stat().st_size > 10_000 for picture in tmp_path.glob("*.jpg"))
