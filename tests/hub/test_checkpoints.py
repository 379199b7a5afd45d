"""Repositories: pushed and pulled over HTTP, written whole or not at all; nothing that they say is trusted."""

import ast
import copy
import errno
import json
import os
import pickle
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load, load_file, save_file
from transformers import AutoProcessor, PreTrainedModel
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from helpers.hub_client import Client, ClientError
from helpers.hub_server import TOKEN, HubServer, Repository
from helpers.reference import ROOT, reference_folder
from helpers.sam3 import save_combined
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.domain_gate import pooled_features
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.frame_step import encode_frames
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import fit_domain, rename_domain

# What is not installed where a repository's own code is used.
NOT_NEEDED = ("samoe_hf", "peft", "matplotlib", "av", "nibabel", "pycocotools", "datasets")

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

# Loads `repo_id` in a fresh cache, and compares it with what was pushed.
PULL = """
import torch
from transformers import AutoModel, AutoProcessor

expected = torch.load(reference, weights_only=True)
model = AutoModel.from_pretrained(repo_id, trust_remote_code=True, cache_dir=cache)
processor = AutoProcessor.from_pretrained(repo_id, cache_dir=cache)
tensors = model.state_dict()
pixel_values, boxes = expected["inputs"]
with torch.no_grad():
    masks = model(pixel_values, input_boxes=boxes).pred_masks
result = {
    "module": type(model).__module__,
    "processor": type(processor).__name__,
    "size": processor.video_processor.size["height"],
    "tensors": tensors.keys() == expected["tensors"].keys()
    and all(torch.equal(tensor, expected["tensors"][name]) for name, tensor in tensors.items()),
    "masks": torch.equal(masks, expected["masks"]),
}
"""

PUSH_ON_SAM3 = """
import torch
from samoe_hf import SamoeModel

model = SamoeModel.from_pretrained("facebook/sam3")
torch.manual_seed(0)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
model.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(5.0)  # or masks would be empty
model.origin.changed = {"mask_decoder.pred_obj_score_head.proj_out.bias"}
SamoeModel.register_for_auto_class()
model.push_to_hub("tester/on-sam3", experts_only=True)
SamoeModel._auto_class = SamoeModel.config_class._auto_class = None
inputs = torch.randn(1, 3, 3, 112, 112), torch.tensor([[[20.0, 20, 90, 70]]])
with torch.no_grad():
    masks = model(inputs[0], input_boxes=inputs[1]).pred_masks
torch.save({"inputs": inputs, "masks": masks, "tensors": model.state_dict()}, reference)
result = float(masks.std())
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return tmp_path_factory.mktemp("reference") / "reference.pt"


@pytest.fixture(scope="module")
def hub_and_clients(model_folder, reference, tmp_path_factory):
    home = tmp_path_factory.mktemp("clients")
    with HubServer() as server:
        author = Client(server.url, home / "author", TOKEN)
        reader = Client(server.url, home / "reader", TOKEN, without=NOT_NEEDED)
        server.source = author.run(PUSH, folder=model_folder, reference=reference)
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


@pytest.fixture
def model(nano):
    return copy.deepcopy(nano.model)


@pytest.fixture
def experts_folder(model_folder, tmp_path):
    """A folder with only what was trained, from the base `model_folder`."""
    model = SamoeModel.from_pretrained(model_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    model.save_pretrained(tmp_path / "experts", experts_only=True)
    return tmp_path / "experts"


def change_config(folder: Path, **changes) -> None:
    """Changes `config.json`; names with double underscores reach into parts of it."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *parts, last = name.split("__")
        target = config
        for part in parts:
            target = target[part]
        target[last] = value
    (folder / "config.json").write_text(json.dumps(config))


# Push and pull


def test_what_is_pushed_is_what_was_trained(server, reference):
    base, experts, full = (server.repositories[f"tester/{name}"] for name in ("base", "experts", "full"))
    expected = torch.load(reference, weights_only=True)["tensors"]
    for repository, names in ((full, set(expected)), (experts, set(filter(is_expert_parameter, expected)))):
        tensors = load(repository.files["model.safetensors"])
        assert tensors.keys() == names
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    config = json.loads(experts.files["config.json"])
    assert config["base_model"]["name_or_path"] == "tester/base"
    assert config["base_model"]["revision"] == base.branches["main"]
    assert server.source["revision"] == base.branches["main"]
    assert len(experts.commits) == 2, "everything comes in one commit"
    assert any(re.fullmatch(r"/objects/\w+/2", path) for _, path in server.requests), "no upload in parts"
    assert not any(name.endswith(".py") for name in base.files) and "modeling_samoe.py" in experts.files


@pytest.mark.parametrize("name", ["experts", "full"])
def test_pulled_in_another_process_it_is_the_same(server, author, reader, reference, tmp_path, name):
    """Without the package by the repository's code; with it, registered, by the package's."""
    values = {"repo_id": f"tester/{name}", "reference": reference}
    pulled = reader.run(PULL, **values, cache=tmp_path / "reader")
    assert pulled["module"].startswith("transformers_modules.tester.")
    own = author.run(PULL, **values, cache=tmp_path / "author")
    assert own["module"] == "samoe_hf.model.modeling_samoe"
    for result in (pulled, own):
        assert result["tensors"] and result["masks"]
        assert (result["processor"], result["size"]) == ("Sam2VideoProcessor", 128)


def test_experts_on_sam3_are_pushed_and_pulled(server, author, reader, tmp_path):
    """Of the base, the detector and the tracker at once, the tracker is taken."""
    save_combined(tmp_path / "sam3")
    base = server.repositories["facebook/sam3"] = Repository()
    revision = base.commit({path.name: path.read_bytes() for path in (tmp_path / "sam3").iterdir()})
    values = {"repo_id": "tester/on-sam3", "reference": tmp_path / "reference.pt"}
    assert author.run(PUSH_ON_SAM3, reference=values["reference"]) > 1e-4
    pushed = server.repositories["tester/on-sam3"].files
    assert sum(not is_expert_parameter(name) for name in load(pushed["model.safetensors"])) == 1
    stated = json.loads(pushed["config.json"])["base_model"]
    assert (stated["name_or_path"], stated["revision"]) == ("facebook/sam3", revision)
    assert b"- sam3" in pushed["README.md"] and b"[SAM 3's tracker](" in pushed["README.md"]
    for client, module in ((author, "samoe_hf.model"), (reader, "transformers_modules.tester.")):
        found = client.run(PULL, **values, cache=tmp_path / module)
        assert found["module"].startswith(module) and found["tensors"] and found["masks"]
        assert (found["processor"], found["size"]) == ("Sam3TrackerVideoProcessor", 112)


def test_a_folder_with_its_own_code_and_domains_is_the_same_in_another_process(reader, nano, tmp_path, monkeypatch):
    """Of a folder, transformers loads the configuration's class twice."""
    for kind in (SamoeModel, SamoeModel.config_class):
        monkeypatch.setattr(kind, "_auto_class", None)
    model = copy.deepcopy(nano.model)
    rename_domain(model, None, "known")
    inputs = [torch.randn(1, 2, 3, 128, 128), torch.tensor([[[20.0, 20, 90, 70]]])]
    frames = inputs[0][:, 0].repeat(20, 1, 1, 1)
    features = pooled_features(encode_frames(model, frames), frames)
    fit_domain(model, "known", features.detach(), torch.arange(20))
    with torch.no_grad():
        output = model(inputs[0], input_boxes=inputs[1])
    assert output.domains == ["known"]
    SamoeModel.register_for_auto_class()
    model.save_pretrained(tmp_path / "model", processor=build_processor(model.config))
    expected = {"inputs": inputs, "masks": output.pred_masks, "tensors": model.state_dict()}
    torch.save(expected, tmp_path / "reference.pt")
    paths = {"repo_id": tmp_path / "model", "reference": tmp_path / "reference.pt", "cache": tmp_path / "cache"}
    found = reader.run(PULL, **{name: str(path) for name, path in paths.items()})
    assert found["module"].startswith("transformers_modules.") and found["tensors"] and found["masks"]


def test_code_of_a_repository_runs_only_where_trusted(server, reader):
    with pytest.raises(ClientError, match="trust_remote_code=True"):
        reader.run("from transformers import AutoModel\nAutoModel.from_pretrained(x, trust_remote_code=False)",
                   x="tester/experts")  # fmt: skip


def test_code_that_travels_is_flat_and_needs_little():
    files = [
        ROOT / "samoe_hf" / "model" / "modeling_samoe.py",
        *get_relative_import_files(ROOT / "samoe_hf" / "model" / "modeling_samoe.py"),
    ]
    assert {Path(file).parent for file in files} == {ROOT / "samoe_hf" / "model"}
    imports = {package for file in files for package in get_imports(file)}
    third_party = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "yaml"}
    standard = {package for package in imports if package in sys.stdlib_module_names}
    assert imports - standard <= third_party


def test_a_base_in_the_cache_is_not_fetched_again(server, author, tmp_path):
    load_code = "from samoe_hf import SamoeModel\nSamoeModel.from_pretrained(x, cache_dir=cache)"
    author.run(load_code, x="tester/base", cache=tmp_path)
    server.bytes_sent.clear()
    author.run(load_code, x="tester/experts", cache=tmp_path)
    weights = len(server.repositories["tester/experts"].files["model.safetensors"])
    assert server.bytes_sent["model.safetensors"] == weights
    assert 20 * weights < len(server.repositories["tester/full"].files["model.safetensors"])
    # And from then on nothing at all.
    author.run(
        "from samoe_hf import SamoeModel\nSamoeModel.from_pretrained(x, cache_dir=cache, local_files_only=True)",
        x="tester/experts", cache=tmp_path,
    )  # fmt: skip


def test_a_later_base_does_not_take_the_earliers_place(server, author, reference, tmp_path):
    repository = server.repositories["tester/base"] = copy.deepcopy(server.repositories["tester/base"])
    repository.commit({**repository.files, "model.safetensors": b"something else"})
    result = author.run(PULL, repo_id="tester/experts", reference=reference, cache=tmp_path)
    assert result["tensors"]


def test_pushing_again_replaces_weights_and_keeps_the_card(server, author):
    author.run(
        """
from samoe_hf import SamoeModel
model = SamoeModel.from_pretrained("tester/base")
model.push_to_hub("again", max_shard_size="4MB", tags=["first"])
"""
    )
    repository = server.repositories["tester/again"]
    assert "model.safetensors.index.json" in repository.files and b"- first" in repository.files["README.md"]
    author.run(
        """
from samoe_hf import SamoeModel
assert SamoeModel.from_pretrained("tester/again").origin.source["name_or_path"] == "tester/again"  # from shards
model = SamoeModel.from_pretrained("tester/base")
model.push_to_hub("again", experts_only=True, tags=["second"], revision="other")
model.push_to_hub("again", experts_only=True, tags=["second"])
"""
    )
    weights = [name for name in repository.files if "safetensors" in name]
    assert weights == ["model.safetensors"]
    assert b"- first" in repository.files["README.md"], "a card that is there stays"
    assert set(repository.branches) == {"main", "other"}


def test_saving_can_push(server, author, tmp_path):
    author.run(
        """
from samoe_hf import SamoeModel
model = SamoeModel.from_pretrained("tester/base")
model.save_pretrained(folder, experts_only=True, push_to_hub=True, repo_id="saved", commit_message="here")
""",
        folder=tmp_path / "folder",
    )
    pushed = server.repositories["tester/saved"].files["model.safetensors"]
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == pushed


def test_a_conversion_is_uploaded_and_can_be_uploaded_again(server, author, tmp_path):
    """The option `--push-to-hub` of `samoe convert`."""
    code = """
from samoe_hf.cli import main
main(["convert", checkpoint, "--config", config, "--output", output, "--push-to-hub", repo_id])
"""
    nano = reference_folder("nano")
    paths = {"checkpoint": nano / "sam2.1_hiera_nano.pt", "config": nano / "sam2.1_hiera_nano_moe.yaml"}
    for name in ("first", "second"):
        author.run(code, **paths, output=tmp_path / "output", repo_id=name)
        files = server.repositories[f"tester/{name}"].files
        assert {"README.md", "config.json", "model.safetensors", "processor_config.json"} <= files.keys()


def test_what_was_trained_does_not_take_its_bases_place(server, author):
    before = dict(server.repositories["tester/base"].files)
    for repo_id in ("base", "tester/base"):
        with pytest.raises(ClientError, match="tester/base holds the base model"):
            author.run(
                "from samoe_hf import SamoeModel\n"
                "SamoeModel.from_pretrained('tester/base').push_to_hub(repo_id, experts_only=True)",
                repo_id=repo_id,
            )
    assert server.repositories["tester/base"].files == before


def test_a_base_that_only_this_machine_has_is_not_pushed(server, author, model_folder):
    with pytest.raises(ClientError, match="which nobody else can fetch") as error:
        author.run(
            """
from samoe_hf import SamoeModel
model = SamoeModel.from_pretrained(folder)
model.push_to_hub("local", experts_only=True)
""",
            folder=model_folder,
        )
    assert "ValueError" in error.value.kind and "`base_model`" in error.value.message
    assert "tester/local" not in server.repositories
    author.run(
        """
from samoe_hf import SamoeModel
model = SamoeModel.from_pretrained(folder)
model.push_to_hub("local", experts_only=True, base_model="tester/base")
""",
        folder=model_folder,
    )
    base = json.loads(server.repositories["tester/local"].files["config.json"])["base_model"]
    assert (base["name_or_path"], base["revision"]) == ("tester/base", server.source["revision"])
    assert b"base_model: tester/base" in server.repositories["tester/local"].files["README.md"]


ADAPTERS = """
import torch
from peft import LoraConfig

def add_adapters(model):
    for name, targets in (("first", ["qkv"]), ("second", ["q_proj"])):
        model.add_adapter(LoraConfig(r=2, target_modules=targets), name)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.set_adapter(["second"])
    return model
"""


@pytest.mark.parametrize("experts_only", [False, True])
def test_adapters_are_pushed_and_pulled(server, author, reader, tmp_path, experts_only):
    same = author.run(
        ADAPTERS
        + """
from samoe_hf import SamoeModel
model = SamoeModel.from_pretrained("tester/experts")
add_adapters(model)
SamoeModel.register_for_auto_class()
model.push_to_hub("adapted", experts_only=experts_only, base_model="tester/base" if experts_only else None)
SamoeModel._auto_class = SamoeModel.config_class._auto_class = None
pulled = SamoeModel.from_pretrained("tester/adapted", cache_dir=cache)
tensors = pulled.state_dict()
same = all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
result = [same, pulled.active_adapters(), pulled.origin.source["name_or_path"]]
""",
        experts_only=experts_only,
        cache=tmp_path / "author",
    )
    assert same == [True, ["second"], "tester/base" if experts_only else "tester/adapted"]
    files = server.repositories["tester/adapted"].files
    assert {f"{a}/{f}" for a in ("first", "second") for f in ("adapter_config.json", "adapter_model.safetensors")} == {
        name for name in files if "/" in name
    }
    # The reader does not have PEFT.
    with pytest.raises(ClientError, match=r"(?i)requires the peft library") as error:
        reader.run(
            "from transformers import AutoModel\nAutoModel.from_pretrained(x, trust_remote_code=True, cache_dir=cache)",
            x="tester/adapted", cache=tmp_path / "reader",
        )  # fmt: skip
    assert "ImportError" in error.value.kind


# Faults on the way


def test_an_upload_that_is_cut_leaves_nothing_and_can_be_repeated(server, author):
    push = """
from unittest import mock
from samoe_hf import SamoeModel
model = SamoeModel.from_pretrained("tester/base")
model.get_submodule(model.expert_module_names[0]).router.bias.data += 1  # else the server has this file already
with mock.patch("huggingface_hub.utils._http.time.sleep"):
    model.push_to_hub("cut", experts_only=True)
"""
    server.cut_uploads = 10_000
    with pytest.raises(ClientError, match=r"(?i)disconnect|reset|broken|closed|protocol"):
        author.run(push)
    assert list(server.repositories["tester/cut"].files) == [".gitattributes"]
    server.cut_uploads = None
    author.run(push)
    assert {"config.json", "model.safetensors", "README.md"} <= set(server.repositories["tester/cut"].files)


@pytest.mark.parametrize("repo_id", ["tester/full", "tester/experts"])
def test_a_download_that_is_cut_is_an_error_and_goes_on_where_it_ended(server, author, reference, tmp_path, repo_id):
    cut = len(server.repositories[repo_id].files["model.safetensors"]) // 2
    server.cut_downloads = cut
    with pytest.raises(ClientError):
        author.run(
            """
from unittest import mock
from samoe_hf import SamoeModel
with mock.patch("huggingface_hub.file_download.time.sleep"):
    SamoeModel.from_pretrained(x, cache_dir=cache)
""",
            x=repo_id,
            cache=tmp_path,
        )
    assert not list(tmp_path.rglob("snapshots/*/*.safetensors"))
    server.cut_downloads = None
    server.bytes_sent.clear()
    result = author.run(PULL, repo_id=repo_id, reference=reference, cache=tmp_path)
    assert result["tensors"] and result["masks"]


@pytest.mark.parametrize(
    "code, message",
    [
        ("SamoeModel.from_pretrained('tester/base').push_to_hub('x', token='hf_wrong')", "401"),
        ("SamoeModel.from_pretrained('tester/nothing')", "tester/nothing"),
        ("SamoeModel.from_pretrained('tester/nothing', token='hf_wrong')", "tester/nothing"),
        ("SamoeModel.from_pretrained('tester/base', revision='nowhere')", "nowhere"),
        ("SamoeModel.from_pretrained('tester/base', subfolder='nowhere')", "has no config.json"),
    ],
)
def test_refusals_of_the_hub_are_told(server, author, code, message):
    with pytest.raises(ClientError) as error:
        author.run(f"from samoe_hf import SamoeModel\n{code}")
    assert "OSError" in error.value.kind and message in error.value.message
    assert "tester/x" not in server.repositories


def test_a_full_disk_leaves_nothing_half_written(server, author, reference, tmp_path):
    """Files of more than 100 kB cannot be written for a while, neither the download's nor the model's."""
    limited = """
import resource
from samoe_hf import SamoeModel
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
try:
    {}
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
"""
    with pytest.raises(ClientError) as error:
        author.run(limited.format("SamoeModel.from_pretrained('tester/full', cache_dir=cache)"), cache=tmp_path / "c")
    assert "OSError" in error.value.kind
    assert not list(tmp_path.rglob("snapshots/*/*.safetensors"))
    result = author.run(PULL, repo_id="tester/full", reference=reference, cache=tmp_path / "c")
    assert result["tensors"]
    for experts_only in (False, True):
        with pytest.raises(ClientError, match="too large"):
            author.run(
                "from samoe_hf import SamoeModel\nmodel = SamoeModel.from_pretrained('tester/base')"
                + limited.format(f"model.save_pretrained(out, experts_only={experts_only})"),
                out=tmp_path / "out",
            )
        assert not (tmp_path / "out").exists()


# Training runs

RUN = """
import json
from samoe_hf.training.trainer import build_trainer

config = {
    "model_name_or_path": "tester/base",
    "train_data": [{"kind": "synthetic", "num_videos": 2, "num_frames": 3, "image_size": [64, 64]}],
    "eval_data": [{"kind": "synthetic", "num_videos": 1, "num_frames": 3, "image_size": [64, 64], "seed": 5}],
    "num_frames": 3, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-3,
    "report_to": "none", "disable_tqdm": True, "output_dir": output, "push_to_hub": True,
    "hub_model_id": "run-" + strategy, "hub_strategy": strategy, "hub_always_push": True,
}
with open(output + ".yaml", "w") as file:
    json.dump(config, file)
trainer = build_trainer([output + ".yaml"])
trainer.train()
if strategy == "end":
    trainer.evaluate()
    trainer.push_to_hub(license="apache-2.0", dataset="tester/synthetic")
trainer._finish_current_push()
from samoe_hf import SamoeModel
pulled = SamoeModel.from_pretrained("tester/run-" + strategy, **where)
tensors = trainer.model.state_dict()
result = all((tensor == tensors[name]).all().item() for name, tensor in pulled.state_dict().items())
"""


# `every_save` is in the fast tests with adapters.
@pytest.mark.parametrize(
    "strategy", ["end", pytest.param("every_save", marks=pytest.mark.slow), "checkpoint", "all_checkpoints"]
)
def test_runs_push_what_they_train(server, author, tmp_path, strategy):
    folders = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}
    where = {"subfolder": folders[strategy]} if strategy in folders else {}
    assert author.run(RUN, output=tmp_path / "run", strategy=strategy, where=where)
    repository = server.repositories[f"tester/run-{strategy}"]
    assert {"config.json", "model.safetensors", "processor_config.json"} <= set(repository.files)
    assert len(load(repository.files["model.safetensors"])) == 4 * 16
    assert not any(name.startswith("_") for name in repository.files)
    if strategy == "end":
        card = repository.files["README.md"].decode()
        assert "model-index:" in card and "type: J&F" in card and "license: apache-2.0" in card
        assert "| learning_rate | 0.001 |" in card and "- tester/synthetic" in card
    else:
        summaries = len(repository.commits)
        assert summaries >= 3, "a push for each checkpoint"


def test_runs_push_adapters(server, author, tmp_path):
    code = RUN.replace(
        'trainer = build_trainer([output + ".yaml"])',
        """
from unittest import mock
from samoe_hf.training.arguments import ModelArguments
load = ModelArguments.load
with mock.patch.object(ModelArguments, "load", lambda arguments: add_adapters(load(arguments))):
    trainer = build_trainer([output + ".yaml"])
""",
    )
    assert author.run(ADAPTERS + code, output=tmp_path / "run", strategy="every_save", where={})
    files = server.repositories["tester/run-every_save"].files
    assert {"first/adapter_model.safetensors", "second/adapter_config.json"} <= set(files)


def test_a_run_from_a_local_base_says_at_once_that_it_cannot_be_pushed(server, author, model_folder, tmp_path):
    code = RUN.replace('"model_name_or_path": "tester/base"', '"model_name_or_path": folder')
    with pytest.raises(ClientError, match="save_only_trained=False"):
        author.run(code, output=tmp_path / "run", strategy="end", where={}, folder=model_folder)
    assert "tester/run-end" not in server.repositories


# Folders with only what was trained


def test_a_folder_of_experts_has_a_processor(experts_folder, nano):
    assert AutoProcessor.from_pretrained(experts_folder).video_processor.size["height"] == 128
    settings = json.loads((experts_folder / "processor_config.json").read_text())
    settings["video_processor"]["do_rescale"] = False
    (experts_folder / "processor_config.json").write_text(json.dumps(settings))
    nano.model.save_pretrained(experts_folder, experts_only=True)
    assert not AutoProcessor.from_pretrained(experts_folder).video_processor.do_rescale, "the user's own stays"


def test_tensors_trained_earlier_are_kept(model_folder, tmp_path):
    model = SamoeModel.from_pretrained(model_folder)
    model.set_trainable("experts", "decoder")
    with torch.no_grad():
        model.mask_decoder.iou_token.weight += 1
    model.save_pretrained(tmp_path / "one", experts_only=True)
    loaded = SamoeModel.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two", experts_only=True)
    again = SamoeModel.from_pretrained(tmp_path / "two")
    assert torch.equal(again.mask_decoder.iou_token.weight, model.mask_decoder.iou_token.weight)


@pytest.mark.parametrize("value", [1e-6, 1.0])
def test_another_base_is_refused_with_both_names(experts_folder, model_folder, tmp_path, value):
    other = shutil.copytree(model_folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["memory_attention.layer_norm.bias"][0] += value
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    change_config(experts_folder, base_model__name_or_path=str(other))
    with pytest.raises(ValueError, match=r"experts builds on \S*other, but .*fingerprint"):
        SamoeModel.from_pretrained(experts_folder)
    model = SamoeModel.from_pretrained(model_folder)
    with pytest.raises(ValueError, match=r"other is not the base .*nano"):
        model.save_pretrained(tmp_path / "new", experts_only=True, base_model=str(other))
    assert not (tmp_path / "new").exists()


def test_a_base_of_another_size_or_none_is_refused_with_both_names(experts_folder, tmp_path):
    config = SamoeConfig(**{**read_yaml(ROOT / "configs" / "model_nano.yaml"), "memory_attention_num_layers": 3})
    SamoeModel(config).save_pretrained(tmp_path / "deeper")
    for base in ("deeper", "nowhere.pt"):
        change_config(experts_folder, base_model__name_or_path=str(tmp_path / base))
        with pytest.raises(ValueError, match=rf"experts builds on \S*{base}"):
            SamoeModel.from_pretrained(experts_folder)


@pytest.mark.parametrize(
    "saved, dtype",
    [
        (torch.float32, "float16"),
        (torch.bfloat16, torch.float32),
        pytest.param(torch.float32, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float16, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_fingerprint_does_not_depend_on_the_type_it_is_loaded_in(model_folder, tmp_path, saved, dtype):
    model = SamoeModel.from_pretrained(model_folder, dtype=saved)
    model.save_pretrained(tmp_path / "experts", experts_only=True)
    model.save_pretrained(tmp_path / "whole")
    assert SamoeModel.from_pretrained(tmp_path / "experts").dtype == saved
    loaded = SamoeModel.from_pretrained(tmp_path / "experts", dtype=dtype)
    expected = SamoeModel.from_pretrained(tmp_path / "whole", dtype=dtype)
    for (name, one), (_, two) in zip(
        [*loaded.named_parameters(), *loaded.named_buffers()],
        [*expected.named_parameters(), *expected.named_buffers()],
        strict=True,
    ):
        assert one.dtype == two.dtype and torch.equal(one, two), name


def test_settings_can_be_given_and_layers_added(experts_folder, nano):
    more = [*nano.model.expert_module_names, "mask_decoder.iou_prediction_head.proj_in"]
    model = SamoeModel.from_pretrained(experts_folder, fill_hole_area=8, expert_modules=more)
    assert model.config.fill_hole_area == 8 and len(model.expert_module_names) == 17
    tensors = load_file(experts_folder / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="`num_experts_per_tok`"):
        SamoeModel.from_pretrained(experts_folder, num_experts_per_tok=99)


def test_experts_give_place_to_others_only_if_asked(model_folder, nano, tmp_path):
    for settings in ({"num_experts": 6}, {"lora_rank": 2}, {"num_experts": 6, "expert_modules": ["q_proj"]}):
        with pytest.raises(ValueError, match=r"`ignore_mismatched_sizes=True` gives the model new experts"):
            SamoeModel.from_pretrained(model_folder, **settings)
        model = SamoeModel.from_pretrained(model_folder, ignore_mismatched_sizes=True, **settings)
        module = model.get_submodule(model.expert_module_names[0])
        assert module.num_experts == settings.get("num_experts", 4) and not module.lora_B.any()
        assert module.lora_A.abs().max() > 0
        plain = {name: t for name, t in nano.model.state_dict().items() if not is_expert_parameter(name)}
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.items())
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    change_config(folder, mask_decoder_config__mlp_dim=64)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        SamoeModel.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert "new experts" not in str(error.value)


def test_older_weights_do_not_stay_beside_new_ones(model_folder, tmp_path):
    model = SamoeModel.from_pretrained(model_folder)
    model.save_pretrained(tmp_path, max_shard_size="4MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path, experts_only=True)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"model.safetensors", "config.json", "processor_config.json", "notes.txt"}
    model.save_pretrained(tmp_path)
    assert SamoeModel.from_pretrained(tmp_path).origin.source["name_or_path"] == str(tmp_path)


@pytest.mark.parametrize("experts_only", [False, True])
@pytest.mark.parametrize("failing", [SamoeConfig, LoraConfig])
def test_a_save_that_fails_changes_nothing(model_folder, tmp_path, monkeypatch, experts_only, failing):
    model = SamoeModel.from_pretrained(model_folder)
    model.add_adapter(LoraConfig(r=2, target_modules=["qkv"]), "mine")
    model.save_pretrained(tmp_path / "old")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    before = {file: file.read_bytes() for file in (tmp_path / "old").rglob("*") if file.is_file()}
    assert tmp_path / "old" / "mine" / "adapter_model.safetensors" in before

    def write_some(config, directory, **_):
        (Path(directory) / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(failing, "save_pretrained", write_some)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path / name, experts_only=experts_only)
    assert {file: file.read_bytes() for file in (tmp_path / "old").rglob("*") if file.is_file()} == before
    assert not (tmp_path / "new").exists()


# Nothing that a repository says is trusted


@pytest.fixture
def forbid_building(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("memory for the tensors would be allocated here")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 10**9},
        {"num_experts": 10**6},
        {"num_experts": 5},
        {"lora_rank": 10**7},
        {"lora_rank": 8},
        {"memory_attention_hidden_size": 10**8},
        {"memory_encoder_output_channels": 128},
        {"mask_decoder_config__mlp_dim": 10**6},
        {"mask_decoder_config__num_hidden_layers": 10**6},
        {"mask_decoder_config__num_multimask_outputs": 10**6},
        {"memory_attention_num_layers": 10**5},
        {"memory_attention_num_layers": 3},
        {"memory_fuser_num_layers": 10**9},
        {"memory_attention_rope_feat_sizes": [10**6, 10**6]},
        {"vision_config__backbone_config__blocks_per_stage": [10**6, 1, 1, 1]},
        {"vision_config__backbone_config__hidden_size": 10**8},
        {"vision_config__backbone_config__hidden_size": -16},
        {"vision_config__backbone_config__embed_dim_per_stage": [10**400, 2, 3, 4]},
        {"vision_config__backbone_config__window_positional_embedding_background_size": [10**6, 10**6]},
        {"mask_downsampler_total_stride": 10**6},
        {"num_maskmem": 10**9},
        {"num_labels": 10**9},
        {"expert_modules": ".*"},
    ],
    ids=lambda changes: "-".join(f"{name.split('__')[-1]}" for name in changes),
)
def test_configurations_that_lie_are_refused_before_anything_is_allocated(
    model_folder, tmp_path, forbid_building, changes
):
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    change_config(folder, **changes)
    start = time.time()
    with pytest.raises(ValueError):
        SamoeModel.from_pretrained(folder)
    assert time.time() - start < 10


def test_experts_out_of_proportion_are_refused(model_folder, tmp_path, forbid_building):
    """A SAM 2 model, without experts, whose configuration asks for many."""
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not is_expert_parameter(n)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, num_experts=10**5)
    with pytest.raises(ValueError, match=r"`num_experts` \(100000\)"):
        SamoeModel.from_pretrained(folder)


def test_experts_that_contradict_their_configuration_are_refused(experts_folder, forbid_building):
    change_config(experts_folder, num_experts=10**6)
    with pytest.raises(ValueError, match=r"experts builds on \S*nano\S*, which cannot be loaded for it.*`num_experts`"):
        SamoeModel.from_pretrained(experts_folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret.safetensors", "model.bin", 5])
def test_shards_outside_of_the_folder_are_refused(model_folder, tmp_path, shard):
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    shutil.move(folder / "model.safetensors", tmp_path / "secret.safetensors")
    names = load_file(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {name: shard for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no safetensors file of its folder"):
        SamoeModel.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"PK\x03\x04nonsense", "half"])
@pytest.mark.parametrize("kind", ["whole", "experts"])
def test_damaged_weights_are_named(model_folder, experts_folder, tmp_path, content, kind):
    folder = shutil.copytree(model_folder if kind == "whole" else experts_folder, tmp_path / "folder")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ValueError, match=r"folder.model\.safetensors is truncated, damaged"):
        SamoeModel.from_pretrained(folder)


BAD_BASES = [
    {"name_or_path": "../../x"},
    {"name_or_path": "/etc"},
    {"name_or_path": "/home/user/model.pt"},
    {"name_or_path": "model.pt"},
    {"name_or_path": "tester/base", "original_config": "../../../etc/passwd"},
    {"name_or_path": "tester/base", "original_config": "/etc/passwd"},
    {"name_or_path": "tester/base", "revision": "../../../../x"},
    {"name_or_path": "tester/base", "subfolder": "../../x"},
    {"name_or_path": "tester/base", "subfolder": "/etc"},
    {"name_or_path": None},
    {},
]


@pytest.mark.parametrize("base", BAD_BASES, ids=lambda base: "-".join(map(str, base.values())) or "empty")
def test_bases_that_climb_or_lie_on_the_readers_machine_are_refused(server, author, base):
    files = dict(server.repositories["tester/experts"].files)
    config = json.loads(files["config.json"])
    fingerprint = config["base_model"]["fingerprint"]
    config["base_model"] = {**base, "fingerprint": fingerprint}
    server.repositories["tester/bad"] = Repository()
    server.repositories["tester/bad"].commit({**files, "config.json": json.dumps(config).encode()})
    with pytest.raises(ClientError, match="expected a Hub id with a commit") as error:
        author.run("from samoe_hf import SamoeModel\nSamoeModel.from_pretrained('tester/bad')")
    assert "ValueError" in error.value.kind and "tester/bad" in error.value.message


@pytest.mark.parametrize("name", ["../mine", "/etc", "_mine", "a/b", "checkpoint-1", ""])
def test_names_of_adapters_that_climb_are_refused(model_folder, tmp_path, name):
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    change_config(folder, adapters={name: True})
    with pytest.raises(ValueError, match=f"as a folder's name, .*got '{name}'"):
        SamoeModel.from_pretrained(folder)


@pytest.mark.parametrize("changes", [{"r": 10**9}, {"rank_pattern": {"0.attn.qkv": 10**9}}, {"target_modules": ".*"}])
def test_adapters_that_lie_are_refused_before_anything_is_allocated(model_folder, tmp_path, changes):
    model = SamoeModel.from_pretrained(model_folder)
    model.add_adapter(LoraConfig(r=2, target_modules=["qkv"]), "mine")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    (tmp_path / "mine" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError):
        SamoeModel.from_pretrained(tmp_path)


def test_an_adapter_does_not_lead_to_other_weights(server, author, model_folder, tmp_path):
    files = dict(server.repositories["tester/full"].files)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(model_folder)}
    server.repositories["tester/adapted"] = Repository()
    server.repositories["tester/adapted"].commit({**files, "adapter_config.json": json.dumps(adapter).encode()})
    with pytest.raises(ClientError, match="a model and a PEFT adapter at once"):
        author.run("from samoe_hf import SamoeModel\nSamoeModel.from_pretrained('tester/adapted')")
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match="a model and a PEFT adapter at once"):
        SamoeModel.from_pretrained(folder)


def test_bases_in_a_circle_are_refused(server, author):
    for name, other in (("one", "two"), ("two", "one")):
        files = dict(server.repositories["tester/experts"].files)
        config = json.loads(files["config.json"])
        config["base_model"] |= {"name_or_path": f"tester/{other}", "revision": None}
        repository = server.repositories[f"tester/{name}"] = Repository()
        repository.commit({**files, "config.json": json.dumps(config).encode()})
    with pytest.raises(ClientError, match=r"tester/one builds on tester/two.*only what was trained itself"):
        author.run("from samoe_hf import SamoeModel\nSamoeModel.from_pretrained('tester/one')")


@pytest.mark.parametrize("path", ["../base", "../../etc"])
def test_a_relative_base_is_refused_in_a_folder_too(experts_folder, path):
    change_config(experts_folder, base_model__name_or_path=path)
    with pytest.raises(ValueError, match="expected a Hub id with a commit or an absolute path"):
        SamoeModel.from_pretrained(experts_folder)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["checkpoint.pt", "pytorch_model.bin", "training_args.bin", "model.safetensors"])
def test_no_pickle_is_executed(model_folder, tmp_path, name):
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    attack = tmp_path / "executed"
    for kind in ("torch", "pickle"):
        if kind == "torch":
            torch.save({"model": Touch(attack)}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps({"model": Touch(attack)}))
        if name == "training_args.bin":
            SamoeModel.from_pretrained(folder)
        else:
            if name == "pytorch_model.bin":
                (folder / "model.safetensors").unlink(missing_ok=True)
            with pytest.raises((ValueError, OSError)):
                SamoeModel.from_pretrained(folder / name if name.endswith(".pt") else folder)
        assert not attack.exists()
    pickle.loads(pickle.dumps(Touch(attack)))
    assert attack.exists(), "the attack itself works"


def test_the_package_opens_no_pickle_unsafely():
    for file in [*(ROOT / "samoe_hf").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = f"{getattr(node.func.value, 'id', '')}.{node.func.attr}"
            if called == "torch.load":
                arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert arguments.get("weights_only") == "True", f"{file}:{node.lineno}"
            assert called not in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"), (
                f"{file}:{node.lineno}"
            )
            if called == "np.load":
                allowed = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "allow_pickle"]
                assert set(allowed) <= {"False"}, f"{file}:{node.lineno}"


@pytest.mark.slow
def test_experts_of_base_plus_are_under_3_megabytes(hub_and_clients, tmp_path):
    """Prints sizes, times and bytes; run with `-s`."""
    server, author, _ = hub_and_clients
    result = author.run(
        """
import time
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml

SamoeModel(SamoeConfig(**read_yaml(config))).push_to_hub("plus")
model = SamoeModel.from_pretrained("tester/plus", cache_dir=cache)
start = time.time()
model.push_to_hub("plus-experts", experts_only=True)
pushing = time.time() - start
model.push_to_hub("plus-full")

def timed(name, cache):
    start = time.time()
    SamoeModel.from_pretrained(name, cache_dir=cache)
    return round(time.time() - start, 2)

result = {"push": round(pushing, 2)}
result["experts, base cached"] = timed("tester/plus-experts", cache)
result["experts, all cached"] = timed("tester/plus-experts", cache)
result["full, fresh cache"] = timed("tester/plus-full", cache + "-fresh")
result["full, cached"] = timed("tester/plus-full", cache + "-fresh")
""",
        config=ROOT / "configs" / "model_base_plus.yaml",
        cache=tmp_path / "cache",
    )
    sizes = {
        name: sum(map(len, server.repositories[f"tester/{name}"].files.values()))
        for name in ("plus-experts", "plus-full")
    }
    print("\nseconds", result, "bytes", sizes)
    assert sizes["plus-experts"] < 3_000_000 < 100 * 3_000_000 < sizes["plus-full"]
