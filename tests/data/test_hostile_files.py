"""Damaged and hostile files of every kind are read to plausible data, or refused with an error that names them."""

import pytest

from helpers.hostile_files import damaged_datasets, outcomes_in_a_process


@pytest.mark.parametrize("seed, count", [(0, 130), pytest.param(1, 2600, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused_by_name(tmp_path, seed, count):
    outcomes = outcomes_in_a_process(damaged_datasets, tmp_path, count, seed)
    assert outcomes["refused"] > 0.5 * count and outcomes["read"] > 0.1 * count
    assert not list(tmp_path.rglob("executed")), "nothing that a file holds is run"
