"""Meta's `edgetam.pt` is read, and written again."""

import json

import pytest
import torch

from helpers.domains import add_learned_domain
from helpers.edgetam import needs_timm
from helpers.reference import FIXTURES
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.cli import main
from samoe_hf.data.registry import read_yaml
from samoe_hf.original.checkpoint import load_original, save_edgetam
from samoe_hf.surgery.merge import merge_into_base

pytestmark = needs_timm
# Names and shapes of the tensors of Meta's own code (`edgetam-dimos` 1.0.1).
SHAPES = json.loads((FIXTURES / "edgetam_shapes.json").read_text())


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    count = torch.tensor(7)
    return {name: torch.randn(shape).abs() if shape else count for name, shape in SHAPES.items()}


@pytest.fixture
def checkpoint(tensors, tmp_path):
    torch.save({"model": tensors}, tmp_path / "edgetam.pt")
    return tmp_path / "edgetam.pt"


def test_all_tensors_are_read_and_written_as_they_were(checkpoint, tensors, tmp_path, caplog):
    model = SamoeModel.from_pretrained(checkpoint)
    add_learned_domain(model, "lora", 1, num_experts=1, num_experts_per_tok=1, lora_rank=4)
    model.save_pretrained(tmp_path / "model")
    words = ["--domain", "lora", "--to", "edgetam", "--output", str(tmp_path / "lora")]
    main(["convert", str(tmp_path / "model"), *words])
    written = torch.load(tmp_path / "lora" / "edgetam.pt", weights_only=True)["model"]
    assert written.keys() == tensors.keys()
    changed = {name for name, x in tensors.items() if not torch.equal(written[name], x)}
    assert changed and all(".to_" in name or "_proj." in name for name in changed)
    assert "pixels" not in caplog.text
    plain = merge_into_base(model, "lora").state_dict()
    model.config.resize(256)  # which no tensor tells, and Meta's YAML says otherwise
    save_edgetam(model.config, plain, tmp_path / "small")
    assert "The model takes frames of 256 pixels, and EdgeTAM by Meta's YAML those of 1024." in caplog.text
    again = load_original(tmp_path / "lora" / "edgetam.pt")[1]
    assert again.keys() == plain.keys() and all(torch.equal(again[name], x) for name, x in plain.items())


def test_what_does_not_fit_is_refused_by_name(tensors, tmp_path):
    name = "spatial_perceiver.layers.1.attn.to_kv.weight"
    torch.save({name: x for name, x in tensors.items()} | {name: torch.zeros(64, 64)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt do not fit.*cross_attention.k_proj.weight \(32, 64\) instead of"):
        load_original(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="`experts` and `original_config` go with SAM 2's"):
        load_original(tmp_path / "other.pt", original_config="x.yaml")
    nano = SamoeModel(SamoeConfig(**read_yaml("model_edgetam_nano")))
    with pytest.raises(ValueError, match="The tensors of the model do not fit"):
        save_edgetam(nano.config, merge_into_base(nano).state_dict(), tmp_path)
    small = SamoeConfig(**read_yaml("model_nano"))
    with pytest.raises(ValueError, match="The model's base is SAM 2; expected EdgeTAM"):
        save_edgetam(small, {}, tmp_path)
