"""Damaged and hostile folders of models are loaded to a model that works, or refused with an error that names them."""

import ast
import json
import pickle
import random
import re
import shutil
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from helpers.hostile_files import BYTES, damage_json, outcomes_in_a_process
from helpers.reference import ROOT, change_config
from samoe_hf import SamoeModel
from samoe_hf.model.adapters import check_adapter_name
from samoe_hf.surgery.domains import rename_domain


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A header that says something else of one tensor, or values that are no numbers."""
    length = struct.unpack("<Q", data[:8])[0]
    header, values = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    name = rng.choice([name for name in header if name != "__metadata__"])
    change = rng.choice(["dtype", "shape", "offsets", "rename", "drop", "nan", "length"])
    if change == "dtype":
        header[name]["dtype"] = rng.choice(["F64", "I64", "BF16", "F16", "BOOL", "X", 5])
    elif change == "shape":
        header[name]["shape"] = rng.choice(
            [[], [0], [-1], [2**62, 4], [10**6, 10**6], ["a"], header[name]["shape"][::-1]]
        )
    elif change == "offsets":
        header[name]["data_offsets"] = rng.choice([[0, 0], [0, 2**60], [-8, 8], [8, 0], None])
    elif change == "rename":
        header[rng.choice(["x", "../x", f"{name}.base_layer", "é", "memory_attention.extra"])] = header.pop(name)
    elif change == "drop":
        del header[name]
    elif change == "nan":
        start = header[name]["data_offsets"][0]
        values[start : start + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf")]))
    packed = json.dumps(header).encode()
    size = rng.choice([2**63, 2**40, 0]) if change == "length" else len(packed)
    return struct.pack("<Q", size) + packed + bytes(values)


def damage(folder: Path, rng: random.Random) -> str:
    path = rng.choice([path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors")])
    special = damage_json if path.suffix == ".json" else damage_safetensors
    change = rng.choice([special, special, *BYTES[::3]])
    path.write_bytes(change(path.read_bytes(), rng))
    return f"{path.relative_to(folder)}: {change.__name__}"


@torch.no_grad()
def try_to_load(folder: Path) -> dict:
    try:
        model = SamoeModel.from_pretrained(folder)
        size, domain = model.config.image_size, next(iter(model.config.domain_names), None)
        output = model(torch.zeros(1, 2, 3, size, size), input_boxes=torch.tensor([[[1.0, 1, 20, 20]]]), domain=domain)
        assert output.pred_masks.isfinite().all()
    except (ValueError, OSError) as error:
        return {"outcome": "refused" if str(folder) in str(error) else "not named", "error": str(error)}
    except BaseException:
        return {"outcome": "raw", "error": traceback.format_exc()[-1500:]}
    return {"outcome": "loaded"}


def damaged_folders(work: Path, seed: int, template: Path) -> Iterator[tuple[str, Path, Callable[[], dict]] | None]:
    """For [`outcomes_in_a_process`]."""
    try_to_load(template)  # imports what is imported late
    yield
    for number in count():
        case = shutil.copytree(template, work / f"case_{number}")
        yield damage(case, random.Random(f"{seed} {number}")), case, partial(try_to_load, case)


@pytest.fixture
def template(model_folder, tmp_path):
    """A model with an adapter in two shards, and beside it one with only what was trained."""
    model = SamoeModel.from_pretrained(model_folder)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "one")
    model.save_pretrained(tmp_path / "template", max_shard_size="4MB")
    return tmp_path / "template"


@pytest.mark.parametrize("seed, number", [(0, 6), pytest.param(1, 400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["whole", "experts", "domains"])
def test_damaged_folders_are_loaded_or_refused_by_name(template, model_folder, tmp_path, kind, seed, number):
    if kind != "whole":
        model, template = SamoeModel.from_pretrained(model_folder), tmp_path / kind
        if kind == "domains":
            rename_domain(model, None, "one")
        model.save_pretrained(template, experts_only=True)
    outcomes = outcomes_in_a_process(damaged_folders, tmp_path, number, seed, template)
    assert outcomes["refused"] > 0.3 * number


# Configurations


@pytest.fixture
def folder(model_folder, tmp_path):
    """A model's folder, free to be changed."""
    return shutil.copytree(model_folder, tmp_path / "folder")


@pytest.fixture
def forbid_building(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("memory for the tensors would be allocated here")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


def refused(folder, message=""):
    """Loading must fail with an error that names the folder."""
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(folder))}.*{message}"):
        SamoeModel.from_pretrained(folder)


LIES = [
    {"num_experts": 10**9}, {"num_experts": 5}, {"lora_rank": 10**7}, {"memory_attention_hidden_size": 10**8},
    {"memory_encoder_output_channels": 128}, {"mask_decoder_config__mlp_dim": 10**6},
    {"mask_decoder_config__num_multimask_outputs": 10**6}, {"memory_attention_num_layers": 10**5},
    {"memory_fuser_num_layers": 10**9}, {"memory_attention_rope_feat_sizes": [10**6, 10**6]},
    {"vision_config__backbone_config__blocks_per_stage": [10**6, 1, 1, 1]},
    {"vision_config__backbone_config__hidden_size": -16},
    {"vision_config__backbone_config__embed_dim_per_stage": [10**400, 2, 3, 4]},
    {"vision_config__backbone_config__window_positional_embedding_background_size": [10**6, 10**6]},
    {"num_maskmem": 10**9}, {"num_labels": 10**9}, {"expert_modules": r"(\w+\w+)+!"},
    {"expert_modules": "(a|b)" * 40}, {"memory_attention_rope_theta": None},
    {"mask_downsampler_padding": 0}, {"prompt_encoder_config__patch_size": 1},
    {"prompt_encoder_config__dtype": 1e308}, {"vision_config__dtype": "int8"}, {"vision_config": 5},
    {"image_size": "128"}, {"image_size": 256}, {"base_model": {"name_or_path": None}},
]  # fmt: skip


@pytest.mark.parametrize("changes", LIES, ids=lambda changes: "-".join(name.split("__")[-1] for name in changes))
def test_configurations_that_lie_are_refused_before_anything_is_allocated(folder, forbid_building, changes):
    change_config(folder, **changes)
    start = time.time()
    refused(folder)
    assert time.time() - start < 10


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_configuration_that_is_no_mapping_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=r"config\.json|JSON"):
        SamoeModel.from_pretrained(folder)


def test_experts_that_contradict_their_configuration_are_refused(experts_folder, forbid_building):
    change_config(experts_folder, num_experts=10**6)
    refused(experts_folder, r"builds on \S*nano\S*, which cannot be loaded for it.*`num_experts`")


def test_a_relative_base_is_refused(experts_folder):
    change_config(experts_folder, base_model__name_or_path="../base")
    refused(experts_folder, "expected a Hub id with a commit or an absolute path")


# Weights

Q_PROJ = "memory_attention.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("no_memory_embedding", lambda x: x.fill_(float("nan")), "' has NaN or infinite values"),
        (f"{Q_PROJ}.lora_B", lambda x: x.fill_(float("inf")), "' has NaN or infinite values"),
        (f"{Q_PROJ}.weight", lambda x: x.to(torch.int64), ""),
        (f"{Q_PROJ}.weight", lambda x: x.double(), "' is of type float64, and others are not"),
    ],
)
def test_tensors_that_are_no_weights_are_refused_by_name(folder, name, change, message):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: change(tensors[name])}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, f"{name}{message}")


@pytest.mark.parametrize("change", ["missing", "unexpected", "missing.*lora_B"])
def test_tensors_that_do_not_fit_are_refused(folder, change):
    tensors = load_file(folder / "model.safetensors")
    if change == "unexpected":
        tensors["memory_attention.extra"] = torch.zeros(1)
    else:
        removed = "layer_norm.weight" if change == "missing" else "lora_B"
        del tensors[next(name for name in tensors if name.endswith(removed))]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, change)


@pytest.mark.parametrize("content", [b"\xff" * 8 + b"{}", "half"])
def test_damaged_weights_are_named(folder, experts_folder, content):
    for damaged in (folder, experts_folder):
        whole = (damaged / "model.safetensors").read_bytes()
        (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
        refused(damaged, r"model\.safetensors is truncated, damaged")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret.safetensors", "model.bin", 5])
def test_shards_outside_of_the_folder_are_refused(folder, tmp_path, shard):
    shutil.move(folder / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(tmp_path / "secret.safetensors"), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "no safetensors file of its folder")


@pytest.mark.parametrize(
    ("content", "missing"),
    [("[]", "no `weight_map`"), ('{"weight_map": {"a": "model.safetensors"}, "metadata": []}', ".* `metadata`")],
)
def test_an_index_without_a_map_or_metadata_is_refused(folder, content, missing):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(content.replace("model.", "model-1."))
    refused(folder, rf"model\.safetensors\.index\.json .*{missing}")


# Adapters


def test_names_of_adapters_that_climb_are_refused(folder):
    for name in ("/etc", "_mine", "a/b", "checkpoint-1", ""):
        with pytest.raises(ValueError, match=f"as a folder's name, .*got '{name}'"):
            check_adapter_name(name)
    change_config(folder, adapters={"../mine": True})
    with pytest.raises(ValueError, match=r"as a folder's name, .*got '\.\./mine'"):
        SamoeModel.from_pretrained(folder)


@pytest.mark.parametrize("changes", [{"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}])
def test_adapters_that_lie_are_refused_before_anything_is_allocated(template, changes):
    path = template / "one" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError):
        SamoeModel.from_pretrained(template)


# No code


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["checkpoint.pt", "pytorch_model.bin", "training_args.bin", "model.safetensors"])
def test_no_pickle_is_executed(folder, tmp_path, name):
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
        text = file.read_text()
        loads = re.search(r"\b(torch|pickle|yaml|np)\s*\.\s*\w*load", text)  # few do, and parsing takes long
        for node in ast.walk(ast.parse(text)) if loads else ():
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
