"""Random layouts are read as they were made, or refused."""

from collections import Counter

import pytest

from helpers.random_layouts import TOOLS, differences, make
from samoe_hf.data import load_videos
from samoe_hf.errors import InputError


def outcome(root, seed):
    """Which kind of layout it is; "read", "refused" or what is wrong; and the message of the refusal."""
    root.mkdir()
    kind, truth = make(root, seed)
    try:
        wrong = differences(load_videos(root), truth, kind)
        return kind, "; ".join(wrong) or "read", ""
    except InputError as error:
        return kind, "refused", str(error)


@pytest.mark.parametrize("seeds", [range(50), pytest.param(range(50, 550), marks=pytest.mark.slow)], ids=len)
def test_layouts_are_read_as_they_were_made_or_refused(seeds, tmp_path):
    found = {seed: outcome(tmp_path / f"seed_{seed}", seed) for seed in seeds}
    wrong = {seed: (kind, result) for seed, (kind, result, _) in found.items() if result not in ("read", "refused")}
    counts = Counter((kind, result) for kind, result, _ in found.values())
    for kind in ("people", "times", "lists", *TOOLS):
        print(f"| {kind} | {counts[kind, 'read']} | {counts[kind, 'refused']} |")
    for seed, (kind, result, message) in found.items():
        if result == "refused":
            print(seed, kind, message[:300])
    assert not wrong, wrong
