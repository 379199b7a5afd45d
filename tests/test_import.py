"""The package is imported at once, and transformers knows its types nevertheless."""

import multiprocessing
import os
import subprocess
import sys
from importlib import import_module, reload
from pkgutil import walk_packages

import pytest
import transformers
from transformers import AutoModel
from transformers.models.auto import configuration_auto, modeling_auto

import samoe_hf
from helpers.reference import ROOT
from samoe_hf.auto import MODEL_TYPE, TABLES, register


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ours", "theirs", "thread"])
def test_transformers_knows_the_types_in_any_order_of_imports(order):
    program = ROOT / "tests" / "programs" / "import_orders.py"
    result = subprocess.run([sys.executable, program, order], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_tables_that_transformers_imports_later_have_the_types(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for path in TABLES:
        name = path.rpartition(".")[2]
        monkeypatch.setattr(transformers.models.auto, name, sys.modules[path])  # a second import puts another there
        monkeypatch.delitem(sys.modules, path)
    register()
    for path, (table, kind) in TABLES.items():
        assert getattr(import_module(path), table)[MODEL_TYPE] == kind


def test_where_transformers_is_loaded_the_types_are_known_at_once(monkeypatch):
    monkeypatch.delitem(configuration_auto.CONFIG_MAPPING_NAMES, MODEL_TYPE, raising=False)
    monkeypatch.delitem(modeling_auto.MODEL_MAPPING_NAMES, MODEL_TYPE, raising=False)
    register()
    assert type(AutoModel.from_pretrained(samoe_hf.small_base())) is samoe_hf.SamoeModel


def test_every_module_is_imported_with_what_python_has_on_windows():
    process = multiprocessing.get_context("fork").Process(target=import_as_on_windows)
    process.start()
    process.join()
    assert process.exitcode == 0


def import_as_on_windows():
    modules = [m.name for m in walk_packages(samoe_hf.__path__, "samoe_hf.") if m.name != "samoe_hf.__main__"]
    for name in modules:  # with the libraries, which have their ways to tell systems apart
        import_module(name)
    for name in ("fork", "getuid", "register_at_fork", "sched_getaffinity"):
        delattr(os, name)
    sys.modules |= dict.fromkeys(("fcntl", "pwd", "resource", "termios"))
    for name in modules:
        reload(sys.modules[name])
