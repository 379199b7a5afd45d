"""The demo: from the small base to two more domains, with nothing forgotten."""

import re
import subprocess
import sys

import demo
import pytest
import torch


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


def test_the_demo_does_all_it_says_with_less_to_do(small_folder, tmp_path, monkeypatch, capsys, one_thread):
    for name, value in {"TRAIN_VIDEOS": 6, "TRAIN_FRAMES": 2, "TEST_VIDEOS": 1, "TEST_FRAMES": 3}.items():
        monkeypatch.setattr(demo, f"NUM_{name}", value)
    monkeypatch.setattr(demo, "SHOWN_FRAMES", range(0, 3, 2))
    monkeypatch.setattr(demo, "KNOWN_LOOKS", ("shapes",))
    monkeypatch.setattr(demo, "small_base", lambda: small_folder)
    torch.set_num_threads(2)
    words = ["--steps", "1", "--domain", "stripes", "--output", str(tmp_path)]
    demo.main(words)
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
    with pytest.raises(SystemExit):
        demo.main(words)
    assert "holds what an earlier demo learned" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_learns_and_forgets_nothing(tmp_path, capsys, one_thread):
    demo.main(["--output", str(tmp_path)])
    printed = capsys.readouterr().out
    scores = table(printed)
    assert scores["stripes"][1] > scores["stripes"][0] + 10 and scores["blobs"][2] > scores["blobs"][1] + 10
    assert scores["shapes"][0] > 50 and "are the same to the bit" in printed
    again = subprocess.run([sys.executable, demo.__file__, "--output", tmp_path], capture_output=True, text=True)
    assert again.stderr.startswith("usage: demo.py"), "nothing before it is said that is not ours"
