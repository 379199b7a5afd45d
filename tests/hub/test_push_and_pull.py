"""Repositories: pushed and pulled over HTTP, also by runs, whole or not at all; where they lead is not trusted."""

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from helpers.hub_client import Client, ClientError
from helpers.hub_server import TOKEN, HubServer, Repository
from helpers.reference import ROOT, reference_folder
from helpers.sam3 import save_combined
from samoe_hf import SamoeModel
from samoe_hf.model.domain_gate import pooled_features
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.frame_step import encode_frames
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import fit_domain, rename_domain

# What is not installed where a repository's own code is used.
NOT_NEEDED = ("samoe_hf", "peft", "matplotlib", "av", "nibabel", "pycocotools", "datasets")

LOAD = "from samoe_hf import SamoeModel\nmodel = SamoeModel.from_pretrained(x)\n"
LOAD_BASE = "from samoe_hf import SamoeModel\nmodel = SamoeModel.from_pretrained('tester/base')\n"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A file with the tensors, inputs and masks of what was pushed."""
    return tmp_path_factory.mktemp("pushed") / "pushed.pt"


@pytest.fixture(scope="module")
def server_and_author(model_folder, pushed, tmp_path_factory):
    with HubServer() as server:
        author = Client(server.url, tmp_path_factory.mktemp("author"), TOKEN)
        server.source = author.call("push", folder=model_folder, expected=pushed)
        yield server, author
        author.close()


@pytest.fixture
def server(server_and_author):
    """The server with `tester/base`, and `tester/experts` and `tester/full` trained from it; without faults."""
    server = server_and_author[0]
    repositories = dict(server.repositories)
    yield server
    server.cut_uploads = server.cut_downloads = None
    server.repositories = repositories


@pytest.fixture
def author(server, server_and_author):
    """A process where the package is installed, which pushed the repositories."""
    return server_and_author[1]


@pytest.fixture(scope="module")
def reader(server_and_author, tmp_path_factory):
    """A process without the package."""
    client = Client(server_and_author[0].url, tmp_path_factory.mktemp("reader"), TOKEN, without=NOT_NEEDED)
    yield client
    client.close()


def test_what_is_pushed_is_what_was_trained(server, pushed):
    base, experts, full = (server.repositories[f"tester/{name}"] for name in ("base", "experts", "full"))
    expected = torch.load(pushed, weights_only=True)["tensors"]
    for repository, names in ((full, set(expected)), (experts, set(filter(is_expert_parameter, expected)))):
        tensors = load(repository.files["model.safetensors"])
        assert tensors.keys() == names
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    config = json.loads(experts.files["config.json"])
    assert config["base_model"]["name_or_path"] == "tester/base"
    assert config["base_model"]["revision"] == server.source["revision"] == base.branches["main"]
    assert len(experts.commits) == 2, "everything comes in one commit"
    assert any(re.fullmatch(r"/objects/\w+/2", path) for _, path in server.requests), "no upload in parts"
    assert not any(name.endswith(".py") for name in base.files) and "modeling_samoe.py" in experts.files


@pytest.mark.parametrize("name", ["experts", "full"])
def test_pulled_in_another_process_it_is_the_same(server, author, reader, pushed, tmp_path, name):
    """Without the package by the repository's code; with it, registered, by the package's."""
    for client, module in ((reader, "transformers_modules.tester."), (author, "samoe_hf.model.modeling_samoe")):
        found = client.call("pull", repo_id=f"tester/{name}", expected=pushed, cache=tmp_path / module)
        assert found["module"].startswith(module) and found["same"] and found["same masks"]
        assert found["processor"] == ["Sam2VideoProcessor", 128]


def test_experts_on_sam3_are_pushed_and_pulled(server, author, reader, tmp_path):
    """Of the base, the detector and the tracker at once, the tracker is taken."""
    save_combined(tmp_path / "sam3")
    base = server.repositories["facebook/sam3"] = Repository()
    revision = base.commit({path.name: path.read_bytes() for path in (tmp_path / "sam3").iterdir()})
    assert author.call("push_on_sam3", expected=tmp_path / "expected.pt") > 1e-4
    files = server.repositories["tester/on-sam3"].files
    assert sum(not is_expert_parameter(name) for name in load(files["model.safetensors"])) == 1
    stated = json.loads(files["config.json"])["base_model"]
    assert (stated["name_or_path"], stated["revision"]) == ("facebook/sam3", revision)
    assert b"- sam3" in files["README.md"] and b"[SAM 3's tracker](" in files["README.md"]
    for client, module in ((author, "samoe_hf.model"), (reader, "transformers_modules.tester.")):
        values = {"repo_id": "tester/on-sam3", "expected": tmp_path / "expected.pt", "cache": tmp_path / module}
        found = client.call("pull", **values)
        assert found["module"].startswith(module) and found["same"] and found["same masks"]
        assert found["processor"] == ["Sam3TrackerVideoProcessor", 112]


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
    torch.save(expected, tmp_path / "expected.pt")
    values = {"repo_id": tmp_path / "model", "expected": tmp_path / "expected.pt", "cache": tmp_path / "cache"}
    found = reader.call("pull", **values)
    assert found["module"].startswith("transformers_modules.") and found["same"] and found["same masks"]


def test_code_of_a_repository_runs_only_where_trusted(server, reader):
    with pytest.raises(ClientError, match="trust_remote_code=True"):
        reader.run(
            "from transformers import AutoModel\nAutoModel.from_pretrained('tester/experts', trust_remote_code=False)"
        )


def test_code_that_travels_is_flat_and_needs_little():
    first = ROOT / "samoe_hf" / "model" / "modeling_samoe.py"
    files = [first, *get_relative_import_files(first)]
    assert {Path(file).parent for file in files} == {first.parent}
    imports = {package for file in files for package in get_imports(file)} - sys.stdlib_module_names
    assert imports <= {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "yaml"}


def test_a_base_in_the_cache_is_not_fetched_again(server, author, tmp_path):
    def load_cached(name, more=""):
        code = f"from samoe_hf import SamoeModel\nSamoeModel.from_pretrained(x, cache_dir=cache{more})"
        author.run(code, x=name, cache=tmp_path)

    load_cached("tester/base")
    server.bytes_sent.clear()
    load_cached("tester/experts")
    weights = len(server.repositories["tester/experts"].files["model.safetensors"])
    assert server.bytes_sent["model.safetensors"] == weights
    assert 20 * weights < len(server.repositories["tester/full"].files["model.safetensors"])
    load_cached("tester/experts", ", local_files_only=True")


def test_a_later_base_does_not_take_the_earliers_place(server, author, pushed, tmp_path):
    repository = server.repositories["tester/base"] = copy.deepcopy(server.repositories["tester/base"])
    repository.commit({**repository.files, "model.safetensors": b"something else"})
    assert author.call("pull", repo_id="tester/experts", expected=pushed, cache=tmp_path)["same"]


def test_pushing_again_replaces_weights_and_keeps_the_card(server, author):
    author.run(LOAD_BASE + "model.push_to_hub('again', max_shard_size='4MB', tags=['first'])")
    repository = server.repositories["tester/again"]
    assert "model.safetensors.index.json" in repository.files and b"- first" in repository.files["README.md"]
    author.run(
        LOAD + "assert model.origin.source['name_or_path'] == 'tester/again'\n"  # from shards
        "model = SamoeModel.from_pretrained('tester/base')\n"
        "for revision in ('other', 'main'):\n"
        "    model.push_to_hub('again', experts_only=True, tags=['second'], revision=revision)",
        x="tester/again",
    )
    assert [name for name in repository.files if "safetensors" in name] == ["model.safetensors"]
    assert b"- first" in repository.files["README.md"], "a card that is there stays"
    assert set(repository.branches) == {"main", "other"}


def test_saving_can_push(server, author, tmp_path):
    author.run(LOAD_BASE + "model.save_pretrained(x, experts_only=True, push_to_hub=True, repo_id='saved')", x=tmp_path)
    pushed = server.repositories["tester/saved"].files["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == pushed


def test_a_conversion_is_uploaded_and_can_be_uploaded_again(server, author, tmp_path):
    """The option `--push-to-hub` of `samoe convert`."""
    code = "from samoe_hf.cli import main\nmain(['convert', x, '--config', y, '--output', z, '--push-to-hub', repo_id])"
    nano = reference_folder("nano")
    for name in ("first", "second"):
        values = {"x": nano / "sam2.1_hiera_nano.pt", "y": nano / "sam2.1_hiera_nano_moe.yaml", "z": tmp_path / "out"}
        author.run(code, **values, repo_id=name)
        files = server.repositories[f"tester/{name}"].files
        assert {"README.md", "config.json", "model.safetensors", "processor_config.json"} <= files.keys()


def test_what_was_trained_does_not_take_its_bases_place(server, author):
    before = dict(server.repositories["tester/base"].files)
    for repo_id in ("base", "tester/base"):
        with pytest.raises(ClientError, match="tester/base holds the base model"):
            author.run(LOAD_BASE + "model.push_to_hub(repo_id, experts_only=True)", repo_id=repo_id)
    assert server.repositories["tester/base"].files == before


def test_a_base_that_only_this_machine_has_is_not_pushed(server, author, model_folder):
    with pytest.raises(ClientError, match="which nobody else can fetch") as error:
        author.run(LOAD + "model.push_to_hub('local', experts_only=True)", x=model_folder)
    assert "ValueError" in error.value.kind and "`base_model`" in error.value.message
    assert "tester/local" not in server.repositories
    author.run(LOAD + "model.push_to_hub('local', experts_only=True, base_model='tester/base')", x=model_folder)
    base = json.loads(server.repositories["tester/local"].files["config.json"])["base_model"]
    assert (base["name_or_path"], base["revision"]) == ("tester/base", server.source["revision"])
    assert b"base_model: tester/base" in server.repositories["tester/local"].files["README.md"]


def test_adapters_are_pushed_and_pulled(server, author, reader, tmp_path):
    assert author.call("push_adapters", cache=tmp_path / "author") == [True, ["second"], "tester/base"]
    parts = ("adapter_config.json", "adapter_model.safetensors")
    files = server.repositories["tester/adapted"].files
    assert {name for name in files if "/" in name} == {f"{a}/{part}" for a in ("first", "second") for part in parts}
    with pytest.raises(ClientError, match=r"(?i)requires the peft library") as error:  # the reader does not have it
        reader.call("pull", repo_id="tester/adapted", expected=None, cache=tmp_path / "reader")
    assert "ImportError" in error.value.kind


# Faults on the way


def test_an_upload_that_is_cut_leaves_nothing_and_can_be_repeated(server, author):
    # The experts are changed, or the server would have this file already.
    push = LOAD_BASE + (
        "from unittest import mock\n"
        "model.get_submodule(model.expert_module_names[0]).router.bias.data += 1\n"
        "with mock.patch('huggingface_hub.utils._http.time.sleep'):\n"
        "    model.push_to_hub('cut', experts_only=True)"
    )
    server.cut_uploads = 10_000
    with pytest.raises(ClientError, match=r"(?i)disconnect|reset|broken|closed|protocol"):
        author.run(push)
    assert list(server.repositories["tester/cut"].files) == [".gitattributes"]
    server.cut_uploads = None
    author.run(push)
    assert {"config.json", "model.safetensors", "README.md"} <= set(server.repositories["tester/cut"].files)


def test_a_download_that_is_cut_is_an_error_and_goes_on_where_it_ended(server, author, pushed, tmp_path):
    server.cut_downloads = len(server.repositories["tester/full"].files["model.safetensors"]) // 2
    with pytest.raises(ClientError):
        author.run(
            "from unittest import mock\nfrom samoe_hf import SamoeModel\n"
            "with mock.patch('huggingface_hub.file_download.time.sleep'):\n"
            "    SamoeModel.from_pretrained('tester/full', cache_dir=cache)",
            cache=tmp_path,
        )
    assert not list(tmp_path.rglob("snapshots/*/*.safetensors"))
    server.cut_downloads = None
    result = author.call("pull", repo_id="tester/full", expected=pushed, cache=tmp_path)
    assert result["same"] and result["same masks"]


@pytest.mark.parametrize(
    "code, message",
    [
        ("SamoeModel.from_pretrained('tester/base').push_to_hub('x', token='hf_wrong')", "401"),
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


def test_a_full_disk_leaves_nothing_half_written(server, author, pushed, tmp_path):
    """Files of more than 100 kB cannot be written for a while, neither the download's nor the model's."""

    def run_on_full_disk(step, **values):
        author.run(
            LOAD_BASE + "import resource\n"
            "limits = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))\n"
            f"try:\n    {step}\nfinally:\n    resource.setrlimit(resource.RLIMIT_FSIZE, limits)",
            **values,
        )

    with pytest.raises(ClientError) as error:
        run_on_full_disk("SamoeModel.from_pretrained('tester/full', cache_dir=cache)", cache=tmp_path / "cache")
    assert "OSError" in error.value.kind
    assert not list(tmp_path.rglob("snapshots/*/*.safetensors"))
    assert author.call("pull", repo_id="tester/full", expected=pushed, cache=tmp_path / "cache")["same"]
    for experts_only in (False, True):
        with pytest.raises(ClientError, match="too large"):
            run_on_full_disk(f"model.save_pretrained(out, experts_only={experts_only})", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


# Training runs


# `every_save` is tested with adapters.
@pytest.mark.parametrize(
    ("strategy", "subfolder"),
    [
        ("end", None),
        ("checkpoint", "last-checkpoint"),
        pytest.param("all_checkpoints", "checkpoint-2", marks=pytest.mark.slow),
    ],
)
def test_runs_push_what_they_train(server, author, tmp_path, strategy, subfolder):
    assert author.call("train", model="tester/base", output=tmp_path / "run", strategy=strategy, subfolder=subfolder), (
        "the Hub has other tensors"
    )
    repository = server.repositories[f"tester/run-{strategy}"]
    assert {"config.json", "model.safetensors", "processor_config.json"} <= set(repository.files)
    assert len(load(repository.files["model.safetensors"])) == 4 * 16
    assert not any(name.startswith("_") for name in repository.files)
    if strategy == "end":
        card = repository.files["README.md"].decode()
        assert "model-index:" in card and "type: J&F" in card and "license: apache-2.0" in card
        assert "| learning_rate | 0.001 |" in card and "- tester/synthetic" in card
    else:
        assert len(repository.commits) >= 3, "a push for each checkpoint"


def test_runs_push_adapters(server, author, tmp_path):
    values = {"model": "tester/base", "output": tmp_path / "run", "strategy": "every_save"}
    assert author.call("train", with_adapters=True, **values)
    files = server.repositories["tester/run-every_save"].files
    assert {"first/adapter_model.safetensors", "second/adapter_config.json"} <= set(files)


def test_a_run_from_a_local_base_says_at_once_that_it_cannot_be_pushed(server, author, model_folder, tmp_path):
    with pytest.raises(ClientError, match="save_only_trained=False"):
        author.call("train", model=model_folder, output=tmp_path / "run", strategy="end")
    assert "tester/run-end" not in server.repositories


# Where a repository leads


def publish(server, name, source, files=None, **base):
    """Publishes another's files under `name`, with changes of the base they name."""
    content = {**server.repositories[source].files, **(files or {})}
    if base:
        config = json.loads(content["config.json"])
        config["base_model"] = {"fingerprint": config["base_model"]["fingerprint"], **base}
        content["config.json"] = json.dumps(config).encode()
    repository = server.repositories[name] = Repository()
    repository.commit(content)


BAD_BASES = [
    {"name_or_path": "../../x"},
    {"name_or_path": "/etc"},
    {"name_or_path": "model.pt"},
    {"name_or_path": "tester/base", "original_config": "../../../etc/passwd"},
    {"name_or_path": "tester/base", "original_config": "/etc/passwd"},
    {"name_or_path": "tester/base", "revision": "../../../../x"},
    {"name_or_path": "tester/base", "subfolder": "../../x"},
    {"name_or_path": "tester/base", "subfolder": "/etc"},
    {"name_or_path": None},
    {"revision": None},
]


@pytest.mark.parametrize("base", BAD_BASES, ids=lambda base: "-".join(map(str, base.values())))
def test_bases_that_climb_or_lie_on_the_readers_machine_are_refused(server, author, base):
    publish(server, "tester/bad", "tester/experts", **base)
    with pytest.raises(ClientError, match="expected a Hub id with a commit") as error:
        author.run(LOAD, x="tester/bad")
    assert "ValueError" in error.value.kind and "tester/bad" in error.value.message


def test_an_adapter_does_not_lead_to_other_weights(server, author, model_folder, tmp_path):
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(model_folder)}).encode()
    publish(server, "tester/adapted", "tester/full", {"adapter_config.json": adapter})
    with pytest.raises(ClientError, match="a model and a PEFT adapter at once"):
        author.run(LOAD, x="tester/adapted")
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    (folder / "adapter_config.json").write_bytes(adapter)
    with pytest.raises(ValueError, match="a model and a PEFT adapter at once"):
        SamoeModel.from_pretrained(folder)


def test_bases_in_a_circle_are_refused(server, author):
    for name, other in (("one", "two"), ("two", "one")):
        publish(server, f"tester/{name}", "tester/experts", name_or_path=f"tester/{other}", revision=None)
    with pytest.raises(ClientError, match=r"tester/one builds on tester/two.*only what was trained itself"):
        author.run(LOAD, x="tester/one")
