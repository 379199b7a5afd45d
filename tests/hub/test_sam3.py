"""Experts on SAM 3: the base is pulled from the Hub, what was trained is pushed, and pulled, also by its own code."""

import json

import pytest
from safetensors.torch import load

from helpers.hub_client import Client
from helpers.hub_server import TOKEN, HubServer, Repository
from helpers.sam3 import save_combined
from samoe_hf.model.experts import is_expert_parameter

PUSH = """
import torch
from samoe_hf import SamoeModel

model = SamoeModel.from_pretrained("facebook/sam3")
torch.manual_seed(0)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
model.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(5.0)  # or masks would be empty
model.differs_from_base = {"mask_decoder.pred_obj_score_head.proj_out.bias"}
SamoeModel.register_for_auto_class()
model.push_to_hub("tester/experts", experts_only=True)
inputs = torch.randn(1, 3, 3, 112, 112), torch.tensor([[[20.0, 20, 90, 70]]])
with torch.no_grad():
    masks = model(inputs[0], input_boxes=inputs[1]).pred_masks
torch.save({"inputs": inputs, "masks": masks}, reference)
result = float(masks.std())
"""

PULL = """
import torch
from transformers import AutoModel, AutoProcessor

expected = torch.load(reference, weights_only=True)
model = AutoModel.from_pretrained("tester/experts", trust_remote_code=True, cache_dir=cache)
processor = AutoProcessor.from_pretrained("tester/experts", cache_dir=cache)
with torch.no_grad():
    masks = model(expected["inputs"][0], input_boxes=expected["inputs"][1]).pred_masks
result = [type(model).__module__, type(processor).__name__, torch.equal(masks, expected["masks"])]
"""


@pytest.mark.parametrize("without", [(), ("samoe_hf", "peft", "matplotlib", "av", "datasets")], ids=["package", "code"])
def test_experts_on_sam3_are_pushed_and_pulled(tmp_path, without):
    save_combined(tmp_path / "sam3")
    with HubServer() as server:
        base = server.repositories["facebook/sam3"] = Repository()
        revision = base.commit({path.name: path.read_bytes() for path in (tmp_path / "sam3").iterdir()})
        author = Client(server.url, tmp_path / "author", TOKEN)
        reader = Client(server.url, tmp_path / "reader", TOKEN, without=without)
        try:
            assert author.run(PUSH, reference=tmp_path / "reference.pt") > 1e-4
            pushed = server.repositories["tester/experts"].files
            tensors = load(pushed["model.safetensors"])
            assert sum(not is_expert_parameter(name) for name in tensors) == 1
            stated = json.loads(pushed["config.json"])["base_model"]
            assert (stated["name_or_path"], stated["revision"]) == ("facebook/sam3", revision)
            assert b"sam3" in pushed["README.md"] and b"SAM 3's tracker" in pushed["README.md"]
            known = "" if without else "import samoe_hf\n"  # which registers its classes
            module, processor, same = reader.run(
                known + PULL, reference=tmp_path / "reference.pt", cache=tmp_path / "cache"
            )
        finally:
            author.close()
            reader.close()
    assert module.startswith("transformers_modules.tester." if without else "samoe_hf.model")
    assert processor == "Sam3TrackerVideoProcessor" and same
