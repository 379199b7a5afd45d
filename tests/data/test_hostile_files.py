"""Damaged and hostile files of every kind are read to plausible data, or refused with an error that names them."""

import json
import multiprocessing
from collections import Counter

import pytest

from helpers.hostile_files import read_damaged_files


@pytest.mark.parametrize("seed, count", [(0, 130), pytest.param(1, 2600, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused_by_name(tmp_path, seed, count):
    process = multiprocessing.get_context("fork").Process(target=read_damaged_files, args=(tmp_path, seed, count))
    process.start()
    process.join()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert process.exitcode == 0, f"ended with {process.exitcode} after {lines[-1]}"
    results = [(case["case"], result) for case, result in zip(lines[::2], lines[1::2], strict=True)]
    wrong = [f"{case}: {result['error']}" for case, result in results if result["outcome"] in ("raw", "not named")]
    assert not wrong, "\n".join(wrong[:5])
    outcomes = Counter(result["outcome"] for _, result in results)
    assert len(results) == count and outcomes["refused"] > 0.5 * count and outcomes["read"] > 0.1 * count
    assert not list(tmp_path.rglob("executed")), "nothing that a file holds is run"
