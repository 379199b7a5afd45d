"""The house's rules that no linter checks."""

import grimp
import networkx
import pytest

import samoe_hf


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
