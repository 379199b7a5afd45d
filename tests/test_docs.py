"""README and guides: short, and every file, name, option and key in them is there."""

import argparse
import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.reference import ROOT
from samoe_hf import SamoeModel
from samoe_hf.analysis.usage import ExpertUsage
from samoe_hf.cli import COMMANDS
from samoe_hf.data.configs import shipped_configs
from samoe_hf.data.layouts import LAYOUTS
from samoe_hf.data.options import check_options
from samoe_hf.data.schema import Video
from samoe_hf.training.arguments import run_parser

GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*GUIDES, ROOT / "CHANGELOG.md"]
MAX_README_WORDS = 1300
FOLDERS = ("samoe_hf", "tests", "configs", "scripts", "docs")
# What names stand for in snippets that do not define them.
KNOWN = {"model": SamoeModel, "usage": ExpertUsage, "video": Video}
guides = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks of some languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [content for language, content in found if language in languages]


# --- Files and names


def missing_links(text: str, folder: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [target for target in targets if "://" not in target and not (folder / target).exists()]


def missing_files(text: str) -> list[str]:
    """Paths of the repository that are named, and not there; `*` stands for anything."""
    paths = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w.*/-]*[\w*/]", text)
    return [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]


def find_name(name: str) -> Any:
    """The module or what it has of a dotted name; raises an `ImportError` or `AttributeError`."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def missing_names(text: str) -> list[str]:
    """Dotted names of the package that cannot be found."""
    missing = []
    for name in re.findall(r"(?<![\w/.])samoe_hf(?:\.[a-zA-Z_]\w*)+", text):
        try:
            find_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    return missing


@pytest.mark.parametrize("page", ALL, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    assert missing_links(page.read_text(), page.parent) == []


@guides
def test_files_and_names_are_there(guide):
    text = guide.read_text()
    assert missing_files(text) == [] and missing_names(text) == []
    assert "../shared" not in text and "/work" not in text


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < MAX_README_WORDS


def test_the_index_lists_every_guide():
    index = (ROOT / "docs" / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index, path.name


# --- Python


def python_faults(source: str) -> list[str]:
    """Imports that fail, and calls of known names with arguments that they do not take."""
    names, faults = dict(KNOWN), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                try:
                    names[alias.asname or alias.name] = find_name(f"{node.module}.{alias.name}")
                except (ImportError, AttributeError):
                    faults.append(f"{node.module}.{alias.name}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in KNOWN:
            owner = names[node.value.id]
            if not hasattr(owner, node.attr) and node.attr not in getattr(owner, "__annotations__", {}):
                faults.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            faults += call_faults(node, names)
    return faults


def call_faults(call: ast.Call, names: dict[str, Any]) -> list[str]:
    called = ast.unparse(call.func).split(".")
    target = SamoeModel.forward if called == ["model"] else names.get(called[0])
    for part in called[1:]:
        target = getattr(target, part, None)
    if target is None or not callable(target):
        return []
    try:
        signature = inspect.signature(target)
    except ValueError:  # of a function in C that does not tell
        return []
    is_method = called[0] in KNOWN and "self" in signature.parameters
    arguments = [*([None] if is_method else []), *call.args]
    try:
        signature.bind(*arguments, **{keyword.arg: None for keyword in call.keywords if keyword.arg})
    except TypeError as error:
        return [f"{ast.unparse(call)}: {error}"]
    return []


@guides
def test_python_can_be_run(guide):
    for source in blocks(guide.read_text(), "python"):
        compile(source, guide.name, "exec")
        assert python_faults(source) == [], source


# --- Commands


def command_lines(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of shell blocks with its arguments."""
    for block in blocks(text, "", "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if re.match(r"(samoe|accelerate|torchrun)\b", line) else []
            if words[:1] == ["samoe"]:
                yield words[1], words[2:]
            elif words:
                index = words.index("samoe_hf")
                yield words[index + 1], words[index + 2 :]


def check_command(name: str, arguments: list[str]) -> None:
    """Parses a command's arguments, as far as they can be without its files."""
    assert name in COMMANDS, name
    if name != "train":
        importlib.import_module(f"samoe_hf.commands.{name}").parse_arguments(arguments)
        return
    run, *options = arguments
    assert run.endswith("RUN.yaml") or (ROOT / run).is_file() or run in shipped_configs(), run
    known = {option for action in run_parser()._actions for option in action.option_strings}
    assert {option for option in options if option.startswith("--")} <= known, options


@guides
def test_commands_can_be_parsed(guide):
    for name, arguments in command_lines(guide.read_text()):
        try:
            check_command(name, arguments)
        except SystemExit:
            pytest.fail(f"`samoe {shlex.join([name, *arguments])}` is refused")


@guides
def test_targets_of_make_are_there(guide):
    targets = set(re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for block in blocks(guide.read_text(), "", "sh", "bash"):
        assert set(re.findall(r"^make (\S+)", block, flags=re.MULTILINE)) <= targets


# --- Configurations


def check_run(run: dict[str, Any]) -> None:
    known = {action.dest for action in run_parser()._actions}
    assert set(run) <= known, set(run) - known
    for entry in [*run.get("train_data", []), *run.get("eval_data", [])]:
        options = {name: value for name, value in entry.items() if name not in ("kind", "weight", "video_ids")}
        check_options(LAYOUTS[entry["kind"]].read, options, entry["kind"])


@guides
def test_keys_of_runs_are_known(guide):
    for content in blocks(guide.read_text(), "yaml"):
        check_run(yaml.safe_load(content))


def test_every_kind_of_data_and_its_options_are_in_the_guide():
    rows = [line.strip("|").split("|") for line in (ROOT / "docs" / "data.md").read_text().splitlines()]
    table = {kind: row[2] for row in rows if len(row) == 3 for kind in re.findall(r"`(\w+)`", row[0])}
    assert table.keys() == LAYOUTS.keys()
    for kind, options in table.items():
        named = set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", options)))
        known = inspect.signature(LAYOUTS[kind].read).parameters.keys() - {"root", "split", "domain"}
        assert named <= known and (named == known or "…" in options), (kind, known)


# --- The checks themselves


@pytest.mark.parametrize(
    "source",
    [
        "from samoe_hf import Nothing",
        "model.nothing()",
        "from samoe_hf.surgery.experts import prune_experts\nprune_experts(model, [0, 1])",
        "model.save_pretrained('x', 'y')",
        "from samoe_hf import load_videos\nload_videos(1, 2, 3, 4, 5, 6)",
    ],
)
def test_faults_of_python_are_found(source):
    assert python_faults(source)


def test_faults_of_text_are_found(tmp_path):
    assert missing_links("[a](nowhere.md#b) [c](https://x.y/z)", tmp_path) == ["nowhere.md"]
    assert missing_files("`samoe_hf/nothing.py`, tests/model/, configs/model_*.yaml") == ["samoe_hf/nothing.py"]
    assert missing_names("`samoe_hf.hub` and samoe_hf.hub.nothing.") == ["samoe_hf.hub.nothing"]


@pytest.mark.parametrize(
    "line", ["samoe fly", "samoe track m v --outptu o", "samoe train configs/smoke.yaml --no_key 1"]
)
def test_faults_of_commands_are_found(line):
    [(name, arguments)] = command_lines(f"```\n{line}\n```\n")
    with pytest.raises((AssertionError, SystemExit, argparse.ArgumentError)):
        check_command(name, arguments)


@pytest.mark.parametrize("run", [{"no_key": 1}, {"train_data": [{"kind": "davis", "no_option": 1}]}])
def test_faults_of_runs_are_found(run):
    with pytest.raises((AssertionError, ValueError)):
        check_run(run)
