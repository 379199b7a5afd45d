"""A test server of repositories, and processes that push to it and pull from it; shared by all tests of a worker."""

import pytest

from helpers.hub_client import Client
from helpers.hub_server import TOKEN, HubServer

# What is not installed where a repository's own code is used.
NOT_NEEDED = ("samoe_hf", "peft", "matplotlib", "av", "nibabel", "pycocotools", "datasets")

# Loads `repo_id` in a fresh cache, and compares it with what was pushed.


@pytest.fixture(scope="session")
def pushed(tmp_path_factory):
    """A file with the tensors, inputs and masks of what was pushed."""
    return tmp_path_factory.mktemp("pushed") / "pushed.pt"


PUSH = """
import torch
from samoe_hf import SamoeModel
from samoe_hf.model.processing_samoe import build_processor

original = SamoeModel.from_pretrained(folder)
original.push_to_hub("base")
model = SamoeModel.from_pretrained("tester/base")
torch.manual_seed(0)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.01 * torch.randn_like(parameter)
SamoeModel.register_for_auto_class()
model.push_to_hub("tester/experts", experts_only=True)
model.push_to_hub("tester/full")
SamoeModel._auto_class = SamoeModel.config_class._auto_class = None
pixel_values, boxes = torch.randn(1, 3, 3, 128, 128), torch.tensor([[[20.0, 20, 90, 70]]])
with torch.no_grad():
    masks = model(pixel_values, input_boxes=boxes).pred_masks
torch.save({"inputs": [pixel_values, boxes], "masks": masks, "tensors": model.state_dict()}, reference)
result = model.origin.source
"""


@pytest.fixture(scope="session")
def hub_and_clients(model_folder, pushed, tmp_path_factory):
    home = tmp_path_factory.mktemp("clients")
    with HubServer() as server:
        author = Client(server.url, home / "author", TOKEN)
        reader = Client(server.url, home / "reader", TOKEN, without=NOT_NEEDED)
        server.source = author.run(PUSH, folder=model_folder, reference=pushed)
        yield server, author, reader
        author.close()
        reader.close()


@pytest.fixture
def server(hub_and_clients):
    """The server with `tester/base`, and `tester/experts` and `tester/full` trained from it; without faults."""
    server = hub_and_clients[0]
    repositories = dict(server.repositories)
    yield server
    server.cut_uploads = server.cut_downloads = None
    server.repositories = repositories


@pytest.fixture
def author(hub_and_clients, server):
    """A process where the package is installed, which pushed the repositories."""
    return hub_and_clients[1]


@pytest.fixture
def reader(hub_and_clients, server):
    """A process without the package."""
    return hub_and_clients[2]
