"""Repositories: pushed and pulled over HTTP, also by runs, whole or not at all; where they lead is not trusted."""

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load
from transformers import AutoProcessor, Sam2VideoConfig, Sam2VideoModel, dynamic_module_utils
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports, get_relative_import_files

from helpers.edgetam import edgetam_model, needs_timm
from helpers.hub_client import Client, ClientError
from helpers.hub_server import TOKEN, HubServer, Repository, use_hub
from helpers.reference import CHECKPOINT, CONFIG, ROOT, assert_same_tensors
from helpers.sam3 import save_combined
from programs.hub_pull import compare, pull
from samoe_hf import SamoeModel
from samoe_hf.cli import main
from samoe_hf.hub.repository import find_domains
from samoe_hf.model.domain_gate import pooled_features
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.frame_step import encode_frames
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import add_domain, fit_domain, remove_domain, rename_domain
from samoe_hf.surgery.merge import merge_into_base
from samoe_hf.training.arguments import ModelArguments
from samoe_hf.training.trainer import build_trainer

# What is not installed where a repository's own code is used.
NOT_NEEDED = ("samoe_hf", "peft", "matplotlib", "av", "nibabel", "pycocotools", "datasets")


def change_experts(model, size=0.01):
    """Adds noise to all that is trained."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)


def push_with_code(model, *args, **options):
    """Pushes the model with the package's own code, which AutoModel runs elsewhere."""
    SamoeModel.register_for_auto_class()
    model.push_to_hub(*args, **options)
    SamoeModel._auto_class = SamoeModel.config_class._auto_class = None


def save_expected(model, path):
    """Writes inputs, masks and tensors of the model, and returns how much the masks vary."""
    size = model.config.image_size
    pixel_values, boxes = torch.randn(1, 3, 3, size, size), torch.tensor([[[20.0, 20, 90, 70]]])
    with torch.no_grad():
        masks = model(pixel_values, input_boxes=boxes).pred_masks
    torch.save({"inputs": [pixel_values, boxes], "masks": masks, "tensors": model.state_dict()}, path)
    return masks.std().item()


@pytest.fixture(scope="module")
def hub(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch, HubServer() as server:
        use_hub(server, patch, folder / "cache")
        SamoeModel.from_pretrained(model_folder).push_to_hub("base")
        model = SamoeModel.from_pretrained("tester/base")
        server.base = copy.deepcopy(model)
        change_experts(model)
        push_with_code(model, "tester/experts", experts_only=True)
        push_with_code(model, "tester/full")
        save_expected(model, folder / "expected.pt")
        server.source, server.expected = model.origin.source, folder / "expected.pt"
        yield server


@pytest.fixture
def server(hub):
    """The Hub with `tester/base`, and `tester/experts` and `tester/full` trained from it."""
    repositories = dict(hub.repositories)
    yield hub
    hub.repositories = repositories


@pytest.fixture
def base(server):
    """The model that `tester/base` holds, as it was loaded from there."""
    return copy.deepcopy(server.base)


@pytest.fixture(scope="module")
def reader(hub, tmp_path_factory):
    """A process without the package."""
    client = Client(hub.url, tmp_path_factory.mktemp("reader"), without=NOT_NEEDED)
    yield client
    client.close()


def pull_apart(reader, repo_id, expected, cache):
    code = "import hub_pull\nresult = hub_pull.pull(repo_id, expected, cache)"
    return reader.run(code, repo_id=repo_id, expected=expected, cache=cache)


def test_what_is_pushed_is_what_was_trained(server):
    base, experts, full = (server.repositories[f"tester/{name}"] for name in ("base", "experts", "full"))
    expected = torch.load(server.expected, weights_only=True)["tensors"]
    for repository, names in ((full, set(expected)), (experts, set(filter(is_expert_parameter, expected)))):
        tensors = load(repository.files["model.safetensors"])
        assert tensors.keys() == names
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    config = json.loads(experts.files["config.json"])
    assert config["base_model"]["name_or_path"] == "tester/base"
    assert config["base_model"]["revision"] == server.source["revision"] == base.branches["main"]
    assert len(experts.commits) == 2, "everything comes in one commit"
    assert not any(name.endswith(".py") for name in base.files) and "modeling_samoe.py" in experts.files


SAME = {"same": True, "difference": pytest.approx(0, abs=1e-4), "processor": ["Sam2VideoProcessor", 128]}


def test_pulled_it_is_the_same_by_the_packages_code_and_by_its_own(server, tmp_path, monkeypatch):
    for name in ("experts", "full"):
        assert pull(f"tester/{name}", server.expected, tmp_path / "cache") == SAME | {"module": "samoe_hf"}
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = get_class_from_dynamic_module("modeling_samoe.SamoeModel", "tester/experts", cache_dir=tmp_path / "cache")
    model, processor = (kind.from_pretrained("tester/experts") for kind in (own, AutoProcessor))
    assert compare(model, processor, server.expected) == SAME | {"module": "transformers_modules"}


@pytest.mark.slow
def test_pulled_it_is_the_same_without_the_package(server, reader, tmp_path):
    apart = pull_apart(reader, "tester/experts", server.expected, tmp_path)
    assert apart == SAME | {"module": "transformers_modules"}


@pytest.mark.slow
def test_experts_on_sam3_are_pushed_and_pulled(server, reader, tmp_path):
    """Of the base, the detector and the tracker at once, the tracker is taken."""
    save_combined(tmp_path / "sam3")
    base = server.repositories["facebook/sam3"] = Repository()
    revision = base.commit({path.name: path.read_bytes() for path in (tmp_path / "sam3").iterdir()})
    model, bias = SamoeModel.from_pretrained("facebook/sam3"), "mask_decoder.pred_obj_score_head.proj_out.bias"
    change_experts(model, 0.1)
    model.get_parameter(bias).data.fill_(5.0)  # or masks would be empty
    model.origin.changed = {bias}
    push_with_code(model, "tester/on-sam3", experts_only=True)
    assert save_expected(model, tmp_path / "expected.pt") > 1e-4
    files = server.repositories["tester/on-sam3"].files
    assert sum(not is_expert_parameter(name) for name in load(files["model.safetensors"])) == 1
    stated = json.loads(files["config.json"])["base_model"]
    assert (stated["name_or_path"], stated["revision"]) == ("facebook/sam3", revision)
    assert b"- sam3" in files["README.md"] and b"[SAM 3's tracker](" in files["README.md"]
    found = pull_apart(reader, "tester/on-sam3", tmp_path / "expected.pt", tmp_path / "cache")
    assert found == SAME | {"module": "transformers_modules", "processor": ["Sam3TrackerVideoProcessor", 112]}


@needs_timm
@pytest.mark.slow
def test_experts_on_edgetam_are_pushed_and_pulled(server, reader, tmp_path):
    model = edgetam_model(previous_mask_with_clicks=True)
    merge_into_base(model, "base").save_pretrained(tmp_path / "base")
    build_processor(model.config).save_pretrained(tmp_path / "base")
    base = server.repositories["tester/edgetam"] = Repository()
    base.commit({path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    model = SamoeModel.from_pretrained("tester/edgetam")
    change_experts(model, 0.1)
    push_with_code(model, "tester/on-edgetam", experts_only=True)
    assert save_expected(model, tmp_path / "expected.pt") > 1e-4
    files = server.repositories["tester/on-edgetam"].files
    assert all(map(is_expert_parameter, load(files["model.safetensors"])))
    assert b"- edgetam" in files["README.md"] and b"[EdgeTAM](" in files["README.md"]
    found = pull_apart(reader, "tester/on-edgetam", tmp_path / "expected.pt", tmp_path / "cache")
    assert found == SAME | {"module": "transformers_modules"}


@pytest.mark.slow
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
    found = pull_apart(reader, tmp_path / "model", tmp_path / "expected.pt", tmp_path / "cache")
    assert (found["module"], found["same"]) == ("transformers_modules", True) and found["difference"] < 1e-4


@pytest.mark.slow
def test_code_of_a_repository_runs_only_where_trusted(server, reader):
    load = "from transformers import AutoModel\nAutoModel.from_pretrained('tester/experts', trust_remote_code=False)"
    with pytest.raises(ClientError, match="trust_remote_code=True"):
        reader.run(load)


def test_code_that_travels_is_flat_and_needs_little():
    first = ROOT / "samoe_hf" / "model" / "modeling_samoe.py"
    files = [first, *get_relative_import_files(first)]
    assert {Path(file).parent for file in files} == {first.parent}
    imports = {package for file in files for package in get_imports(file)} - sys.stdlib_module_names
    assert imports <= {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "tqdm", "yaml"}


def test_a_base_in_the_cache_is_not_fetched_again(server, tmp_path):
    SamoeModel.from_pretrained("tester/base", cache_dir=tmp_path)
    server.bytes_sent.clear()
    SamoeModel.from_pretrained("tester/experts", cache_dir=tmp_path)
    weights = len(server.repositories["tester/experts"].files["model.safetensors"])
    assert server.bytes_sent["model.safetensors"] == weights
    assert 20 * weights < len(server.repositories["tester/full"].files["model.safetensors"])
    model = SamoeModel.from_pretrained("tester/experts", cache_dir=tmp_path, local_files_only=True)
    assert model.origin.commit is not None and model.origin.commit != model.origin.source["revision"]
    for weights in tmp_path.glob("models--tester--base/snapshots/*/model.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match=r"tester/base.*model.safetensors is not in the cache, and the Hub is not"):
        SamoeModel.from_pretrained("tester/experts", cache_dir=tmp_path, local_files_only=True)


def test_a_later_base_does_not_take_the_earliers_place(server, tmp_path):
    repository = server.repositories["tester/base"] = copy.deepcopy(server.repositories["tester/base"])
    repository.commit({**repository.files, "model.safetensors": b"something else"})
    assert pull("tester/experts", server.expected, tmp_path)["same"]


def test_pushing_again_replaces_weights_and_keeps_the_card(server, base):
    base.push_to_hub("again", max_shard_size="4MB", tags=["first"])
    repository = server.repositories["tester/again"]
    assert "model.safetensors.index.json" in repository.files and b"- first" in repository.files["README.md"]
    assert SamoeModel.from_pretrained("tester/again").origin.source["name_or_path"] == "tester/again"  # from shards
    for revision in ("other", "main"):
        base.push_to_hub("again", experts_only=True, tags=["second"], revision=revision)
    assert [name for name in repository.files if "safetensors" in name] == ["model.safetensors"]
    card = repository.files["README.md"].decode()
    assert "- first" in card and "- second" in card, "a card that is there stays, but for tags"
    assert set(repository.branches) == {"main", "other"}
    base.push_to_hub("new", revision="b")
    card = server.repositories["tester/new"].commits[server.repositories["tester/new"].branches["b"]]["README.md"]
    assert card.decode().count('from_pretrained("tester/new", revision="b")') == 2


def test_experts_of_domains_are_files_that_go_and_come_with_them(server, base):
    for name, other in ((None, "first"), ("first", "second")):
        rename_domain(base, name, other)
        add_domain(base, f"beside_{other}", like=other)
        base.push_to_hub("two", experts_only=True)
        assert_same_tensors(SamoeModel.from_pretrained("tester/two"), base)
    files = [name for name in server.repositories["tester/two"].files if name.startswith("domains/")]
    assert sorted(files) == [f"domains/{name}.safetensors" for name in ("beside_first", "beside_second", "second")]


def test_of_many_domains_only_the_one_that_is_taken_is_fetched(server, base, tmp_path, capsys):
    rename_domain(base, None, "mine")
    base.push_to_hub("one", experts_only=True)
    for name in ("first", "second"):
        add_domain(base, name, like="mine")
    fit_domain(base, "second", torch.randn(4, base.domain_gate.num_features), torch.arange(4))
    rename_domain(base, "mine", "third")
    base.push_to_hub("many", experts_only=True)
    server.bytes_sent.clear()
    words = ["--domain", "second", "--output", str(tmp_path / "out")]
    main(["domains", "add", "tester/one", "tester/many", *words])
    fetched = [name for name in server.bytes_sent if name.startswith("domains/")]
    assert fetched == ["domains/mine.safetensors", "domains/second.safetensors"]
    main(["domains", "list", "tester/many"])
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{name} .* [1-9]\d* .* \d+\.\d+ ", printed, re.MULTILINE) for name in ("first", "third"))
    assert not {"domains/first.safetensors", "domains/third.safetensors"} & server.bytes_sent.keys()
    remove_domain(base, "first")
    rename_domain(base, "third", "mine")
    assert_same_tensors(SamoeModel.from_pretrained(tmp_path / "out"), base)
    for other, message in (("tester/none", "tester/none"), ("a b", "'a b' is neither a folder or file here")):
        with pytest.raises(SystemExit, match=message):
            main(["domains", "add", "tester/one", other, *words[:3], str(tmp_path / "other")])


def test_domains_are_added_to_a_plain_base_of_the_hub_by_its_name(server, base, tmp_path):
    Sam2VideoModel(Sam2VideoConfig(**base.config.to_dict())).save_pretrained(tmp_path / "plain")
    server.repositories["tester/plain"] = repository = Repository()
    repository.commit({path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()})
    model = SamoeModel.from_pretrained("tester/plain")
    rename_domain(model, None, "mine")
    model.save_pretrained(tmp_path / "mine", experts_only=True)
    main(["domains", "add", "tester/plain", str(tmp_path / "mine"), "--output", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["base_model"]
    assert (config["name_or_path"], config["revision"]) == ("tester/plain", repository.branches["main"])
    assert_same_tensors(SamoeModel.from_pretrained(tmp_path / "out"), model)


def test_domains_are_found_also_where_a_card_was_written_by_hand(server, base):
    repository = server.repositories["tester/own"] = Repository()
    repository.commit({"README.md": b"---\nlicense: mit\n---\n# Mine\n"})
    rename_domain(base, None, "first")
    base.push_to_hub("own", experts_only=True)
    card = repository.files["README.md"].decode()
    assert "license: mit" in card and card.endswith("# Mine\n")
    assert find_domains("tester/base")["tester/own"] == ["first"]
    base.push_to_hub("own", experts_only=True)
    assert repository.files["README.md"].decode() == card


def test_saving_can_push(server, base, tmp_path):
    base.save_pretrained(tmp_path, experts_only=True, push_to_hub=True, repo_id="saved")
    pushed = server.repositories["tester/saved"].files["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == pushed


def test_a_conversion_is_uploaded_and_can_be_uploaded_again(server, tmp_path):
    for name in ("first", "second"):
        options = ["--config", str(CONFIG), "--output", str(tmp_path / "out"), "--push-to-hub", name]
        main(["convert", str(CHECKPOINT), *options])
        pushed = server.repositories[f"tester/{name}"].files
        assert {"README.md", "config.json", "model.safetensors", "processor_config.json"} <= pushed.keys()


def test_what_was_trained_does_not_take_its_bases_place(server, base):
    before = dict(server.repositories["tester/base"].files)
    for repo_id in ("base", "tester/base"):
        with pytest.raises(ValueError, match="tester/base holds the base model"):
            base.push_to_hub(repo_id, experts_only=True)
    assert server.repositories["tester/base"].files == before


def test_a_card_that_cannot_be_written_makes_no_repository(server, base):
    for card, error in (({"licence": "mit"}, TypeError), ({"usage_picture": "missing.png"}, FileNotFoundError)):
        with pytest.raises(error, match=r"licence|missing\.png"):
            base.push_to_hub("typo", card=card)
    assert "tester/typo" not in server.repositories


def test_a_base_that_only_this_machine_has_is_not_pushed(server, model_folder):
    model = SamoeModel.from_pretrained(model_folder)
    with pytest.raises(ValueError, match=r"which nobody else can fetch.*`base_model`"):
        model.push_to_hub("local", experts_only=True)
    assert "tester/local" not in server.repositories
    model.push_to_hub("local", experts_only=True, base_model="tester/base")
    base = json.loads(server.repositories["tester/local"].files["config.json"])["base_model"]
    assert (base["name_or_path"], base["revision"]) == ("tester/base", server.source["revision"])
    assert b"base_model: tester/base" in server.repositories["tester/local"].files["README.md"]


def add_adapters(model):
    """Adds two adapters with an effect, and makes the second active."""
    for name, targets in (("first", ["qkv"]), ("second", ["q_proj"])):
        model.add_adapter(LoraConfig(r=2, target_modules=targets), name)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.set_adapter(["second"])
    return model


def test_adapters_are_pushed_and_pulled(server):
    model = add_adapters(SamoeModel.from_pretrained("tester/experts"))
    push_with_code(model, "adapted", experts_only=True, base_model="tester/base")
    pulled = SamoeModel.from_pretrained("tester/adapted")
    assert_same_tensors(pulled, model)
    assert (pulled.active_adapters(), pulled.origin.source["name_or_path"]) == (["second"], "tester/base")
    parts = ("adapter_config.json", "adapter_model.safetensors")
    files = server.repositories["tester/adapted"].files
    assert {name for name in files if "/" in name} == {f"{a}/{part}" for a in ("first", "second") for part in parts}


@pytest.mark.slow
def test_adapters_are_not_pulled_where_peft_is_missing(server, reader, tmp_path):
    model = add_adapters(SamoeModel.from_pretrained("tester/experts"))
    push_with_code(model, "adapted", experts_only=True, base_model="tester/base")
    with pytest.raises(ClientError, match=r"ImportError: \s*\w+ requires the peft library"):
        pull_apart(reader, "tester/adapted", server.expected, tmp_path)


@pytest.mark.parametrize(
    "load, message",
    [
        (lambda: SamoeModel.from_pretrained("tester/base").push_to_hub("x", token="hf_wrong"), "401"),
        (lambda: SamoeModel.from_pretrained("tester/nothing", token="hf_wrong"), "tester/nothing"),
        (lambda: SamoeModel.from_pretrained("tester/base", revision="nowhere"), "nowhere"),
        (lambda: SamoeModel.from_pretrained("tester/base", subfolder="nowhere"), "has no config.json"),
    ],
)
def test_refusals_of_the_hub_are_told(server, load, message):
    with pytest.raises(OSError, match=message):
        load()
    assert "tester/x" not in server.repositories


# Training runs


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains two steps, pushing by the strategy to `run-STRATEGY`, which must hold the trained model."""

    def run(model, strategy, subfolder="", change=lambda model: model, **settings):
        data = {"kind": "synthetic", "num_videos": 2, "num_frames": 3, "image_size": [64, 64]}
        config = {
            "model_name_or_path": str(model), "train_data": [data], "eval_data": [{**data, "num_videos": 1, "seed": 5}],
            "num_frames": 2, "num_correction_clicks": 0, "max_steps": 2, "save_steps": 1, "learning_rate": 1e-3,
            "per_device_train_batch_size": 1, "report_to": "none", "disable_tqdm": True, "push_to_hub": True,
            "output_dir": str(tmp_path / "run"), "hub_model_id": f"run-{strategy}", "hub_strategy": strategy,
            "hub_always_push": True, "hub_token": TOKEN, **settings,
        }  # fmt: skip
        (tmp_path / "run.yaml").write_text(json.dumps(config))
        load = ModelArguments.load
        monkeypatch.setattr(ModelArguments, "load", lambda arguments: change(load(arguments)))
        trainer = build_trainer([str(tmp_path / "run.yaml")])
        with trainer.writer:  # as the command does
            trainer.train()
        if strategy == "end":
            trainer.evaluate()
            trainer.push_to_hub(license="apache-2.0", dataset="tester/synthetic")
        trainer._finish_current_push()
        assert_same_tensors(SamoeModel.from_pretrained(f"tester/run-{strategy}", subfolder=subfolder), trainer.model)

    return run


@pytest.mark.parametrize(
    ("strategy", "subfolder"), [pytest.param("end", "", marks=pytest.mark.slow), ("checkpoint", "last-checkpoint")]
)
def test_runs_push_what_they_train(server, train, strategy, subfolder):
    train("tester/base", strategy, subfolder)
    repository = server.repositories[f"tester/run-{strategy}"]
    assert {"config.json", "model.safetensors", "processor_config.json"} <= set(repository.files)
    assert len(load(repository.files["model.safetensors"])) == 4 * 16
    assert {name for name in repository.files if name.startswith((".", "_"))} == {".gitattributes"}
    assert not any(TOKEN.encode() in content for content in repository.files.values())
    if strategy == "end":
        card = repository.files["README.md"].decode()
        assert "model-index:" in card and "type: J&F" in card and "license: apache-2.0" in card
        assert "| learning_rate | 0.001 |" in card and "- tester/synthetic" in card
    else:
        assert len(repository.commits) >= 3, "a push for each checkpoint"


@pytest.mark.slow
def test_runs_push_adapters_and_domains(server, train):
    train("tester/base", "every_save", change=add_adapters, domain="new")
    files = server.repositories["tester/run-every_save"].files
    assert "domains/new.safetensors" in files
    assert {"first/adapter_model.safetensors", "second/adapter_config.json"} <= set(files)


def test_a_run_from_a_local_base_says_at_once_that_it_cannot_be_pushed(server, train, model_folder):
    with pytest.raises(ValueError, match="save_only_trained=False"):
        train(model_folder, "end")
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
    {"name_or_path": "../../x"}, {"name_or_path": "/etc"}, {"name_or_path": "model.pt"}, {"name_or_path": None},
    {"name_or_path": "tester/base", "original_config": "../../../etc/passwd"},
    {"name_or_path": "tester/base", "original_config": "/etc/passwd"},
    {"name_or_path": "tester/base", "revision": "../../../../x"},
    {"name_or_path": "tester/base", "subfolder": "../../x"}, {"name_or_path": "tester/base", "subfolder": "/etc"},
    {"revision": None},
]  # fmt: skip


def test_bases_that_climb_or_lie_on_the_readers_machine_are_refused(server):
    for base in BAD_BASES:
        publish(server, "tester/bad", "tester/experts", **base)
        with pytest.raises(ValueError, match=r"(?s)tester/bad.*expected a Hub id with a commit"):
            SamoeModel.from_pretrained("tester/bad")


def test_an_adapter_does_not_lead_to_other_weights(server, model_folder, tmp_path):
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(model_folder)}).encode()
    publish(server, "tester/adapted", "tester/full", {"adapter_config.json": adapter})
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    (folder / "adapter_config.json").write_bytes(adapter)
    for source in ("tester/adapted", folder):
        with pytest.raises(ValueError, match="a model and a PEFT adapter at once"):
            SamoeModel.from_pretrained(source)


def test_bases_in_a_circle_are_refused(server):
    for name, other in (("one", "two"), ("two", "one")):
        publish(server, f"tester/{name}", "tester/experts", name_or_path=f"tester/{other}", revision=None)
    with pytest.raises(ValueError, match=r"tester/one builds on tester/two.*only what was trained itself"):
        SamoeModel.from_pretrained("tester/one")


def test_domains_on_a_base_are_found_by_the_tag_of_their_cards(server, base, capsys):
    rename_domain(base, None, "night")
    base.push_to_hub("tester/night", experts_only=True)
    assert "samoe-domains-on-tester--base" in server.repositories["tester/night"].files["README.md"].decode()
    server.repositories["tester/broken"] = broken = Repository()
    card = server.repositories["tester/night"].files["README.md"]
    broken.commit({"README.md": card, "config.json": b"{"})
    main(["domains", "list", "tester/base", "--hub"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["repository", "domains", "on", "tester/base"]
    assert [line.split() for line in lines[1:]] == [
        ["tester/night", "night"],
        ["tester/broken", "cannot", "be", "read"],
    ]
    main(["domains", "list", "tester/night", "--hub"])
    assert "tester/broken" in capsys.readouterr().out
    main(["domains", "list", "tester/full", "--hub"])
    assert "Nothing on the Hub has domains on tester/full." in capsys.readouterr().out
