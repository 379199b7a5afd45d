"""README and guides: every link, file, name, option and key in them is there."""

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


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks of some languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [content for language, content in found if language in languages]


def find_name(name: str) -> Any:
    """The module or what it has of a dotted name, None if there is none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found
    return None


def anchors(text: str) -> set[str]:
    """Of a page's headings, as links name them."""
    return {re.sub(r"[^\w -]", "", line).replace(" ", "-").lower() for line in re.findall(r"^#+ (.+)", text, re.M)}


def text_faults(text: str, folder: Path) -> Iterator[str]:
    """Links, paths of the repository (`*` stands for anything) and names of the package that lead nowhere."""
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)[^)]*\)", text):
        page = folder / target
        if not page.exists() or (anchor and anchor not in anchors(page.read_text() if target else text)):
            yield f"{target}#{anchor}"
    paths = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w.*/-]*[\w*/]", text)
    yield from (path for path in paths if not any(ROOT.glob(path.rstrip("/"))))
    names = re.findall(r"(?<![\w/.])samoe_hf(?:\.[a-zA-Z_]\w*)+", text)
    yield from (name for name in names if find_name(name) is None)


def python_faults(source: str) -> Iterator[str]:
    """Imports that fail, and calls of known names with arguments that they do not take."""
    nodes, names = list(ast.walk(ast.parse(source))), dict(KNOWN)
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = found = find_name(f"{node.module}.{alias.name}")
                if found is None:
                    yield f"{node.module}.{alias.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in KNOWN:
            owner = names[node.value.id]
            if not hasattr(owner, node.attr) and node.attr not in getattr(owner, "__annotations__", {}):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            try:
                check_call(node, names)
            except TypeError as error:
                yield f"{ast.unparse(node)}: {error}"


def check_call(call: ast.Call, names: dict[str, Any]) -> None:
    first, *rest = ast.unparse(call.func).split(".")
    target = functools.reduce(lambda owner, name: getattr(owner, name, None), rest, names.get(first))
    if first == "model" and not rest:
        target = SamoeModel.forward
    if getattr(target, "__module__", None) is None or not target.__module__.startswith("samoe_hf"):
        return
    signature = inspect.signature(target)
    arguments = [None] * ("self" in signature.parameters) + list(call.args)
    signature.bind(*arguments, **{keyword.arg: None for keyword in call.keywords if keyword.arg})


def command_faults(text: str) -> Iterator[str]:
    """Commands of shell blocks that are not there, or have options that they do not take."""
    targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in "\n".join(blocks(text, "", "sh", "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if re.match(r"(samoe|accelerate|torchrun|make) ", line) else []
        if words[:1] == ["make"]:
            yield from () if words[1] in targets else [line]
        elif words:
            start = words.index("samoe_hf") + 1 if "samoe_hf" in words else 1
            try:
                check_command(words[start], words[start + 1 :])
            except (AssertionError, ValueError, SystemExit) as error:
                yield f"{line}: {error!r}"


@functools.cache
def run_keys() -> dict[str, list[str]]:
    """Each key of a run with its options."""
    return {action.dest: action.option_strings for action in run_parser()._actions}


def check_command(name: str, arguments: list[str]) -> None:
    """Parses a command's arguments, as far as they can be without its files."""
    assert name in COMMANDS
    if name != "train":
        importlib.import_module(f"samoe_hf.commands.{name}").parse_arguments(arguments)
        return
    run, *options = arguments
    assert run.endswith("RUN.yaml") or (ROOT / run).is_file() or run in shipped_configs()
    known = {option for names in run_keys().values() for option in names}
    assert {option for option in options if option.startswith("--")} <= known


def run_faults(run: dict[str, Any]) -> Iterator[str]:
    """Keys that no run has, and options that a reader does not take."""
    yield from run.keys() - run_keys().keys()
    for entry in [*run.get("train_data", []), *run.get("eval_data", [])]:
        of_all = ("kind", "weight", "video_ids", "domain", "window")
        options = {name: value for name, value in entry.items() if name not in of_all}
        try:
            check_options(LAYOUTS[entry["kind"]].read, options, entry["kind"])
        except ValueError as error:
            yield str(error)


def faults(text: str, folder: Path = ROOT) -> list[str]:
    return [
        *text_faults(text, folder),
        *command_faults(text),
        *(fault for source in blocks(text, "python") for fault in python_faults(source)),
        *(fault for run in blocks(text, "yaml") for fault in run_faults(yaml.safe_load(run))),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_it_names_is_there(page):
    assert faults(page.read_text(), page.parent) == []


@pytest.mark.parametrize(
    "text",
    [
        "[a](nowhere.md#b)", "[a](README.md#nowhere)", "[a](#nowhere)", "`samoe_hf/nothing.py`",
        "`samoe_hf.hub.nothing`", "```\nmake nothing\n```",
        "```\nsamoe fly\n```", "```\nsamoe track m v --outptu o\n```", "```\nsamoe train smoke --no_key 1\n```",
        "```yaml\nno_key: 1\n```", "```yaml\ntrain_data: [{kind: davis, no_option: 1}]\n```",
        "```python\nfrom samoe_hf import Nothing\n```", "```python\nmodel.nothing()\n```",
        "```python\nfrom samoe_hf.surgery.experts import prune_experts\nprune_experts(model, [0, 1])\n```",
        "```python\nmodel.save_pretrained('x', 'y')\n```",
    ],
)  # fmt: skip
def test_a_fault_is_found(text):
    assert len(faults(text)) == 1


def test_the_readme_is_short_and_every_guide_is_listed():
    assert len((ROOT / "README.md").read_text().split()) < MAX_README_WORDS
    index, site = (ROOT / "docs" / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or (f"]({path.name})" in index and f": {path.name}\n" in site), path.name
    for path in (ROOT / "docs").glob("*/*.md"):  # else `make docs` stops
        assert f"{path.parent.name}/{path.name}\n" in site, path


def test_every_kind_of_data_and_its_options_are_in_the_guide():
    rows = [line.strip("|").split("|") for line in (ROOT / "docs" / "data.md").read_text().splitlines()]
    table = {kind: row[2] for row in rows if len(row) == 3 for kind in re.findall(r"`(\w+)`", row[0])}
    assert table.keys() == LAYOUTS.keys()
    for kind, options in table.items():
        named = set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", options)))
        known = inspect.signature(LAYOUTS[kind].read).parameters.keys() - {"root", "split", "domain", "window"}
        assert named <= known and (named == known or "…" in options), (kind, known)
