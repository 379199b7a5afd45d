"""The house's rules that no linter checks: sizes of files and functions, and what travels with a repository."""

import ast
import io
import tokenize
from pathlib import Path

import grimp
import networkx
import pytest
from transformers.dynamic_module_utils import get_relative_import_files

import samoe_hf
from helpers.reference import ROOT

FILES = sorted(file.relative_to(ROOT) for folder in ("samoe_hf", "scripts") for file in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 50
# The head of `forward` alone has 20 lines: its arguments and their types.
LONG_FUNCTIONS = {"samoe_hf/model/modeling_samoe.py:forward": 54}
# Of the remote code, with the model's and the configuration's own files; 21 files and 5,332 lines before the rooms.
MAX_REMOTE_FILES, MAX_REMOTE_LINES = 31, 7500


def lines_of_code(source: str) -> set[int]:
    """Numbers of the lines that hold code: no comments, no empty lines."""
    return {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        for line in range(token.start[0], token.end[0] + 1)
    }


def length_of_function(node: ast.FunctionDef, lines: set[int]) -> int:
    """How many of the lines of code are the function's, without its docstring."""
    own = lines & set(range(node.lineno, node.end_lineno + 1))
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        own -= set(range(first.lineno, first.end_lineno + 1))
    return len(own)


def long_functions(source: str) -> dict[str, int]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lines = lines_of_code(source)
    lengths = sorted((length_of_function(function, lines), function.name) for function in functions)
    return {name: length for length, name in lengths if length > MAX_FUNCTION_LINES}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_files_and_functions_are_short(file):
    source = (ROOT / file).read_text()
    length = len(source.splitlines())
    assert length <= MAX_FILE_LINES, f"{file} has {length} lines"
    for name, length in long_functions(source).items():
        assert length <= LONG_FUNCTIONS.get(f"{file}:{name}", 0), f"{name} has {length} lines of code"


def test_lines_of_code_are_counted_without_docstring_comments_and_empty_lines():
    body = "\n".join(["    # why", "", *["    x = 1"] * 50])
    assert long_functions(f'def f():\n    """Two\n    lines."""\n{body}\n') == {"f": 51}


def test_the_remote_code_is_flat_and_small():
    model = ROOT / "samoe_hf" / "model"
    files = {model / "modeling_samoe.py", model / "configuration_samoe.py"}
    files |= {Path(file) for file in get_relative_import_files(str(model / "modeling_samoe.py"))}
    assert {file.parent for file in files} == {model}
    assert len(files) <= MAX_REMOTE_FILES
    assert sum(len(file.read_text().splitlines()) for file in files) <= MAX_REMOTE_LINES


def test_no_files_import_each_other_in_a_circle():
    """Imports in functions and for type checking included; the contracts of `make lint` look at folders."""
    graph = grimp.build_graph("samoe_hf", cache_dir=None)
    imports = networkx.DiGraph(
        (name, imported) for name in graph.modules for imported in graph.find_modules_directly_imported_by(name)
    )
    circles = [sorted(files) for files in networkx.strongly_connected_components(imports) if len(files) > 1]
    assert not circles and len(imports) > 50


def test_public_names_are_there_and_listed():
    assert {"SamoeConfig", "SamoeModel", "SamoeTrainer", "VideoSession", "load_videos"} <= set(samoe_hf.__all__)
    assert set(samoe_hf.__all__) <= set(dir(samoe_hf))
    for name in samoe_hf.__all__:
        assert getattr(samoe_hf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        samoe_hf.nothing  # noqa: B018
