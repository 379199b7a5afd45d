"""The notebook of the guides, run as a reader runs it, with the test server as its Hub."""

import json
import os
import sys

import pytest

from helpers.hub_server import TOKEN, HubServer
from helpers.reference import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def test_it_has_no_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_it_learns_a_domain_and_pushes_it(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    with HubServer() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()
        assert "model.safetensors" in server.repositories["tester/samoe-quickstart"].files
    scores = json.loads((tmp_path / "outputs/quickstart/model/adaptation.json").read_text())
    assert scores["after"]["eval_J&F"] > scores["before"]["eval_J&F"] + 0.1
    assert scores["routed"] == {"val": {"stripes": 4}}
