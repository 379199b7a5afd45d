"""The package is imported at once, and transformers knows its types nevertheless."""

import subprocess
import sys

import pytest
from transformers import AutoModel
from transformers.models.auto import configuration_auto, modeling_auto

import samoe_hf
from helpers.reference import ROOT
from samoe_hf.auto import MODEL_TYPE, register


@pytest.mark.parametrize(
    "words",
    [["thread", "names"], *(pytest.param([order], marks=pytest.mark.slow) for order in ("ours", "theirs", "thread"))],
    ids=" ".join,
)
def test_transformers_knows_the_types_in_any_order_of_imports(words):
    program = ROOT / "tests" / "programs" / "import_orders.py"
    result = subprocess.run([sys.executable, program, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_where_transformers_is_loaded_the_types_are_known_at_once(monkeypatch):
    monkeypatch.delitem(configuration_auto.CONFIG_MAPPING_NAMES, MODEL_TYPE, raising=False)
    monkeypatch.delitem(modeling_auto.MODEL_MAPPING_NAMES, MODEL_TYPE, raising=False)
    register()
    assert type(AutoModel.from_pretrained(samoe_hf.small_base())) is samoe_hf.SamoeModel
