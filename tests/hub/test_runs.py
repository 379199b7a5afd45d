"""Training runs push what they train."""

import pytest
from safetensors.torch import load

from helpers.hub_client import ClientError

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
