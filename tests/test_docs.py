"""README and guides: every link, file, name, option and key in them is there."""

import argparse
import ast
import functools
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

PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *ROOT.glob("docs/**/*.md")]
MAX_README_WORDS = 1300
FOLDERS = ("samoe_hf", "tests", "configs", "scripts", "docs")
# What names stand for in snippets that do not define them.
KNOWN = {"model": SamoeModel, "usage": ExpertUsage, "video": Video}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks of some languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [content for language, content in found if language in languages]


# --- Files and names


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


def text_faults(text: str, folder: Path) -> list[str]:
    """Links, paths of the repository (`*` stands for anything) and names of the package that lead nowhere."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    faults = [target for target in targets if "://" not in target and not (folder / target).exists()]
    paths = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w.*/-]*[\w*/]", text)
    faults += [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]
    for name in re.findall(r"(?<![\w/.])samoe_hf(?:\.[a-zA-Z_]\w*)+", text):
        try:
            find_name(name)
        except (ImportError, AttributeError):
            faults.append(name)
    return faults


@pages
def test_links_files_and_names_are_there(page):
    assert text_faults(page.read_text(), page.parent) == []


def test_the_readme_is_short_and_every_guide_is_listed():
    assert len((ROOT / "README.md").read_text().split()) < MAX_README_WORDS
    index, site = (ROOT / "docs" / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or (f"]({path.name})" in index and f": {path.name}\n" in site), path.name


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
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # not known, or of a function in C that does not tell
        return []
    is_method = called[0] in KNOWN and "self" in signature.parameters
    arguments = [*([None] if is_method else []), *call.args]
    try:
        signature.bind(*arguments, **{keyword.arg: None for keyword in call.keywords if keyword.arg})
    except TypeError as error:
        return [f"{ast.unparse(call)}: {error}"]
    return []


# --- Commands and configurations


def command_lines(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of shell blocks with its arguments."""
    for block in blocks(text, "", "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if re.match(r"(samoe|accelerate|torchrun|make)\b", line) else []
            if words[:1] == ["make"]:
                yield "make", words[1:]
            elif words:
                start = words.index("samoe_hf") + 1 if "samoe_hf" in words else 1
                yield words[start], words[start + 1 :]


@functools.cache
def run_keys() -> dict[str, list[str]]:
    """Each key of a run with its options."""
    return {action.dest: action.option_strings for action in run_parser()._actions}


def check_command(name: str, arguments: list[str]) -> None:
    """Parses a command's arguments, as far as they can be without its files."""
    if name == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), arguments
    elif name != "train":
        assert name in COMMANDS, name
        importlib.import_module(f"samoe_hf.commands.{name}").parse_arguments(arguments)
    else:
        run, *options = arguments
        assert run.endswith("RUN.yaml") or (ROOT / run).is_file() or run in shipped_configs(), run
        known = {option for names in run_keys().values() for option in names}
        assert {option for option in options if option.startswith("--")} <= known, options


def check_run(run: dict[str, Any]) -> None:
    assert set(run) <= run_keys().keys(), set(run) - run_keys().keys()
    for entry in [*run.get("train_data", []), *run.get("eval_data", [])]:
        options = {name: value for name, value in entry.items() if name not in ("kind", "weight", "video_ids")}
        check_options(LAYOUTS[entry["kind"]].read, options, entry["kind"])


@pages
def test_snippets_can_be_run(page):
    text = page.read_text()
    for source in blocks(text, "python"):
        assert python_faults(source) == [], source
    for name, arguments in command_lines(text):
        try:
            check_command(name, arguments)
        except SystemExit:
            pytest.fail(f"`samoe {shlex.join([name, *arguments])}` is refused")
    for content in blocks(text, "yaml"):
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
    ],
)
def test_faults_of_python_are_found(source):
    assert python_faults(source)


def test_faults_of_text_are_found(tmp_path):
    text = "[a](nowhere.md#b) [c](https://x.y/z) `samoe_hf/nothing.py`, tests/model/, samoe_hf.hub and samoe_hf.hub.no."
    assert text_faults(text, tmp_path) == ["nowhere.md", "samoe_hf/nothing.py", "samoe_hf.hub.no"]


@pytest.mark.parametrize("line", ["samoe fly", "samoe track m v --outptu o", "samoe train smoke --no_key 1", "make no"])
def test_faults_of_commands_are_found(line):
    [(name, arguments)] = command_lines(f"```\n{line}\n```\n")
    with pytest.raises((AssertionError, SystemExit, argparse.ArgumentError)):
        check_command(name, arguments)


@pytest.mark.parametrize("run", [{"no_key": 1}, {"train_data": [{"kind": "davis", "no_option": 1}]}])
def test_faults_of_runs_are_found(run):
    with pytest.raises((AssertionError, ValueError)):
        check_run(run)
