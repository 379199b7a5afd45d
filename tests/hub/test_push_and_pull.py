"""Repositories: pushed and pulled over HTTP, written whole or not at all; nothing that they say is trusted."""

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

from helpers.hub_client import ClientError
from helpers.hub_server import Repository
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


@pytest.fixture
def model(nano):
    return copy.deepcopy(nano.model)


# Push and pull


def test_what_is_pushed_is_what_was_trained(server, pushed):
    base, experts, full = (server.repositories[f"tester/{name}"] for name in ("base", "experts", "full"))
    expected = torch.load(pushed, weights_only=True)["tensors"]
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
def test_pulled_in_another_process_it_is_the_same(server, author, reader, pushed, tmp_path, name):
    """Without the package by the repository's code; with it, registered, by the package's."""
    values = {"repo_id": f"tester/{name}", "reference": pushed}
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


def test_a_later_base_does_not_take_the_earliers_place(server, author, pushed, tmp_path):
    repository = server.repositories["tester/base"] = copy.deepcopy(server.repositories["tester/base"])
    repository.commit({**repository.files, "model.safetensors": b"something else"})
    result = author.run(PULL, repo_id="tester/experts", reference=pushed, cache=tmp_path)
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
def test_a_download_that_is_cut_is_an_error_and_goes_on_where_it_ended(server, author, pushed, tmp_path, repo_id):
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
    result = author.run(PULL, repo_id=repo_id, reference=pushed, cache=tmp_path)
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


def test_a_full_disk_leaves_nothing_half_written(server, author, pushed, tmp_path):
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
    result = author.run(PULL, repo_id="tester/full", reference=pushed, cache=tmp_path / "c")
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

# `every_save` is in the fast tests with adapters.


# Folders with only what was trained


# Nothing that a repository says is trusted


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
