"""Configurations that come with the package, by their names."""

import pytest

from helpers.reference import ROOT
from samoe_hf.data import configs
from samoe_hf.data.configs import find_config, names_config, shipped_configs
from samoe_hf.data.registry import read_yaml


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_all_of_the_repository_are_found_anywhere():
    assert shipped_configs().keys() == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    for name, path in shipped_configs().items():
        assert find_config(name) == find_config(f"{name}.yaml") == path
        assert read_yaml(name) == read_yaml(ROOT / "configs" / f"{name}.yaml")
        for text in (name, f"{name}.yaml", "my/run.yml"):
            assert names_config(text)
    assert not names_config("davis") and not names_config("{kind: davis}") and not names_config("x" * 300)


def test_they_are_found_in_a_clone_by_git_on_windows(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").touch()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "configs").write_text("../configs")
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "package" / "configs")
    assert shipped_configs().keys() == {"mine"} and find_config("mine").is_file()


@pytest.mark.parametrize("file, name", [("smoke", "smoke"), ("smoke.yaml", "smoke.yaml"), ("smoke.yaml", "smoke")])
def test_a_file_comes_first(file, name, tmp_path):
    (tmp_path / file).write_text("seed: 7\n")
    assert read_yaml(name) == {"seed": 7}


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("smok", "did you mean 'smoke'?"),
        ("configs/smoke.yaml", "did you mean 'smoke'?"),
        ("qqq", "finetune_ct, finetune_davis"),
    ],
)
def test_what_is_not_there_is_answered_with_names(name, nearest):
    with pytest.raises(FileNotFoundError) as caught:
        find_config(name)
    message = str(caught.value)
    assert message.startswith(f"{name} is no file") and nearest in message
