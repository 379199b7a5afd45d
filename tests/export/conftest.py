"""Models as they are tracked without the package's own tracking."""

from types import SimpleNamespace

import pytest

from helpers.export import EagerTracker, load_tracker
from samoe_hf.export.write import export_model
from samoe_hf.model.processing_samoe import build_processor


@pytest.fixture(scope="session")
def exported(nano, tmp_path_factory) -> SimpleNamespace:
    """The reference with its routers, its processor, its folder of ONNX files, and the tracker of that. It takes half a
    minute."""
    folder, processor = tmp_path_factory.mktemp("exported"), build_processor(nano.model.config)
    export_model(nano.model.eval(), processor, folder)
    return SimpleNamespace(model=nano.model, processor=processor, folder=folder, tracker=load_tracker(folder))


@pytest.fixture(scope="session")
def parts(nano) -> SimpleNamespace:
    """The same without the folder: its parts run in PyTorch."""
    processor = build_processor(nano.model.config)
    tracker = EagerTracker(nano.model.eval(), processor)
    return SimpleNamespace(model=nano.model, processor=processor, tracker=tracker)


@pytest.fixture(scope="session", params=["parts", pytest.param("exported", marks=pytest.mark.slow)])
def reference(request) -> SimpleNamespace:
    return request.getfixturevalue(request.param)
