"""Damaged and hostile folders of models are loaded to a model that works, or refused with an error that names them."""

import json
import multiprocessing
import random
import resource
import shutil
import signal
import struct
import traceback
import warnings
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig

from helpers.hostile_files import BYTES, GIGABYTE, SECONDS, damage_json
from samoe_hf import SamoeModel


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
        size = model.config.image_size
        output = model(torch.zeros(1, 2, 3, size, size), input_boxes=torch.tensor([[[1.0, 1, 20, 20]]]))
        assert output.pred_masks.isfinite().all()
    except (ValueError, OSError) as error:
        return {"outcome": "refused" if str(folder) in str(error) else "not named", "error": str(error)}
    except BaseException:
        return {"outcome": "raw", "error": traceback.format_exc()[-1500:]}
    return {"outcome": "loaded"}


def load_damaged_folders(template: Path, work: Path, seed: int, count: int) -> None:
    """As `read_damaged_files`: 1 GB and 5 seconds of processor time for each case, or the process ends."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try_to_load(template)  # imports what is imported late
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, used + GIGABYTE))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with open(work / "log", "w", buffering=1) as log:
        for number in range(count):
            case = shutil.copytree(template, work / f"case_{number}")
            log.write(json.dumps({"case": f"{number} {damage(case, random.Random(f'{seed} {number}'))}"}) + "\n")
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            outcome = try_to_load(case)
            signal.setitimer(signal.ITIMER_PROF, 0)
            log.write(json.dumps(outcome) + "\n")
            shutil.rmtree(case)


@pytest.fixture
def template(model_folder, tmp_path):
    """A model with an adapter in two shards, and beside it one with only what was trained."""
    model = SamoeModel.from_pretrained(model_folder)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "one")
    model.save_pretrained(tmp_path / "template", max_shard_size="4MB")
    return tmp_path / "template"


@pytest.mark.parametrize("seed, count", [(0, 16), pytest.param(1, 400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["whole", "experts"])
def test_damaged_folders_are_loaded_or_refused_by_name(template, model_folder, tmp_path, kind, seed, count):
    if kind == "experts":
        template = tmp_path / "experts"
        SamoeModel.from_pretrained(model_folder).save_pretrained(template, experts_only=True)
    arguments = (template, tmp_path, seed, count)
    process = multiprocessing.get_context("fork").Process(target=load_damaged_folders, args=arguments)
    process.start()
    process.join()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert process.exitcode == 0, f"ended with {process.exitcode} after {lines[-1]}"
    results = [(case["case"], result) for case, result in zip(lines[::2], lines[1::2], strict=True)]
    wrong = [f"{case}: {result['error']}" for case, result in results if result["outcome"] in ("raw", "not named")]
    assert not wrong, f"{len(wrong)} of {count}\n" + "\n".join(wrong[:8])
    outcomes = Counter(result["outcome"] for _, result in results)
    assert len(results) == count and outcomes["refused"] > 0.3 * count
