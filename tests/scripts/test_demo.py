"""The demo: from the small base to two more domains, with nothing forgotten."""

import re

import demo
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from helpers.pictures import overlapping_texts


@pytest.fixture
def one_thread():
    """The demo changes the number of threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def table(printed: str) -> dict[str, list[float]]:
    """Look -> J&F of the base and after each domain."""
    lines = printed.partition("J&F, 0 to 100")[2].splitlines()[1:]
    rows = [re.match(r"(\w+)\s+((?:[\d.]+\s+)+)", line) for line in lines]
    return {row[1]: [float(value) for value in row[2].split()] for row in rows if row}


def test_the_demo_does_all_it_says_with_less_to_do(tmp_path, monkeypatch, capsys, one_thread):
    for name, value in (("NUM_TRAIN_VIDEOS", 6), ("NUM_TEST_VIDEOS", 1), ("NUM_TEST_FRAMES", 3)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "SHOWN_FRAMES", range(0, 3, 2))
    monkeypatch.setattr(demo, "KNOWN_LOOKS", ("shapes",))
    torch.set_num_threads(2)
    demo.main(["--steps", "1", "--domain", "stripes", "--output", str(tmp_path)])
    assert torch.get_num_threads() == 1
    printed = capsys.readouterr().out
    scores = table(printed)
    assert list(scores) == ["shapes", "stripes"] and scores["shapes"][0] == scores["shapes"][1]
    assert "are the same to the bit" in printed
    for look in scores:
        for name in (f"tracking_{look}.png", f"tracking_{look}.mp4"):
            assert (tmp_path / name).stat().st_size > 1000
        assert len(list((tmp_path / "masks" / f"{look}_2_00000").iterdir())) == 3
    assert (tmp_path / "stripes" / "model.safetensors").is_file() and (tmp_path / "stripes.yaml").is_file()


@pytest.mark.slow
def test_the_demo_learns_and_forgets_nothing(tmp_path, capsys, one_thread):
    demo.main(["--output", str(tmp_path)])
    printed = capsys.readouterr().out
    scores = table(printed)
    assert scores["stripes"][1] > scores["stripes"][0] + 10 and scores["blobs"][2] > scores["blobs"][1] + 10
    assert scores["shapes"][0] > 50 and "are the same to the bit" in printed


def test_tracking_is_shown_beside_frame_and_truth_with_its_iou(tmp_path, monkeypatch):
    figures, empty = [], np.zeros((60, 60), np.int32)
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    whole, half, second = empty.copy(), empty.copy(), empty.copy()
    whole[15:45, 15:45], half[15:45, 15:30], second[15:45, 15:45] = 1, 1, 2
    frames, rows = [np.full((60, 60, 3), 90, np.uint8)] * 3, {"a$b$": [half, empty, empty]}
    demo.plot_tracking(frames, ["0", "1", "2"], [whole, second, empty], rows, tmp_path / "grid.png", "_title $")
    grid = np.array(figures[0].axes).reshape(3, 3)
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["frame", "truth", "a$b$"]
    assert [axes.get_xlabel() for axes in grid[1]] == ["2: empty", "1: empty", "1: empty  2: empty"]
    assert [axes.get_xlabel() for axes in grid[2]] == [
        "1: 0.50  2: empty \N{CHECK MARK}",
        "1: empty \N{CHECK MARK}  2: empty",
        "1: empty \N{CHECK MARK}  2: empty \N{CHECK MARK}",
    ]
    told = [[text.get_text() for text in axes.texts] == ["empty"] for axes in grid.ravel()]
    assert told == [False] * 5 + [True, False, True, True]
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend[:2] == ["object 1", "object 2"] and overlapping_texts(figures[0]) == []
    raw = grid[0, 0].images[0].get_array()
    assert (raw == 90).all() and (grid[2, 0].images[0].get_array() != raw).any()
