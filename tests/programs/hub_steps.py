"""What tests of repositories do in processes of their own; imports are in functions, since some lack the package."""

import json
from unittest import mock


def change_experts(model, size: float = 0.01):
    """Adds noise to all that is trained."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)


def push_with_code(model, *args, **options) -> None:
    """Pushes the model with the package's own code, which AutoModel runs elsewhere."""
    from samoe_hf import SamoeModel

    SamoeModel.register_for_auto_class()
    model.push_to_hub(*args, **options)
    SamoeModel._auto_class = SamoeModel.config_class._auto_class = None


def save_expected(model, size: int, path: str) -> float:
    """Writes inputs, masks and tensors of the model, and returns how much the masks vary."""
    import torch

    pixel_values, boxes = torch.randn(1, 3, 3, size, size), torch.tensor([[[20.0, 20, 90, 70]]])
    with torch.no_grad():
        masks = model(pixel_values, input_boxes=boxes).pred_masks
    torch.save({"inputs": [pixel_values, boxes], "masks": masks, "tensors": model.state_dict()}, path)
    return masks.std().item()


def push(folder: str, expected: str) -> dict:
    """Pushes `tester/base`, and `tester/experts` and `tester/full` with changed experts; returns the base's source."""
    from samoe_hf import SamoeModel

    SamoeModel.from_pretrained(folder).push_to_hub("base")
    model = SamoeModel.from_pretrained("tester/base")
    change_experts(model)
    push_with_code(model, "tester/experts", experts_only=True)
    push_with_code(model, "tester/full")
    save_expected(model, 128, expected)
    return model.origin.source


def push_on_sam3(expected: str) -> float:
    """Pushes experts on `facebook/sam3`, and one tensor of the base."""
    from samoe_hf import SamoeModel

    model = SamoeModel.from_pretrained("facebook/sam3")
    change_experts(model, 0.1)
    bias = "mask_decoder.pred_obj_score_head.proj_out.bias"
    model.get_parameter(bias).data.fill_(5.0)  # or masks would be empty
    model.origin.changed = {bias}
    push_with_code(model, "tester/on-sam3", experts_only=True)
    return save_expected(model, 112, expected)


def pull(repo_id: str, expected: str, cache: str) -> dict:
    """Loads a model by its own code, or the package's where it is installed, and compares it with what was pushed."""
    import torch
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(repo_id, trust_remote_code=True, cache_dir=cache)
    processor = AutoProcessor.from_pretrained(repo_id, cache_dir=cache)
    saved = torch.load(expected, weights_only=True)
    pixel_values, boxes = saved["inputs"]
    with torch.no_grad():
        masks = model(pixel_values, input_boxes=boxes).pred_masks
    tensors = model.state_dict()
    same = tensors.keys() == saved["tensors"].keys()
    return {
        "module": type(model).__module__,
        "processor": [type(processor).__name__, processor.video_processor.size["height"]],
        "same": same and all(torch.equal(x, saved["tensors"][name]) for name, x in tensors.items()),
        "same masks": torch.equal(masks, saved["masks"]),
    }


def add_adapters(model):
    """Adds two adapters with an effect, and makes the second active."""
    import torch
    from peft import LoraConfig

    for name, targets in (("first", ["qkv"]), ("second", ["q_proj"])):
        model.add_adapter(LoraConfig(r=2, target_modules=targets), name)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.set_adapter(["second"])
    return model


def same_tensors(model, other) -> bool:
    import torch

    tensors = other.state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def push_adapters(cache: str) -> list:
    """Pushes `tester/adapted`, and returns what is loaded: whether it is the same, its active adapters, its base."""
    from samoe_hf import SamoeModel

    model = add_adapters(SamoeModel.from_pretrained("tester/experts"))
    push_with_code(model, "adapted", experts_only=True, base_model="tester/base")
    pulled = SamoeModel.from_pretrained("tester/adapted", cache_dir=cache)
    return [same_tensors(model, pulled), pulled.active_adapters(), pulled.origin.source["name_or_path"]]


def train(model: str, output: str, strategy: str, subfolder: str | None = None, with_adapters: bool = False) -> bool:
    """Trains two steps, pushing by the strategy to `run-STRATEGY`; returns whether that holds the trained model."""
    from samoe_hf import SamoeModel
    from samoe_hf.training.arguments import ModelArguments
    from samoe_hf.training.trainer import build_trainer

    data = {"kind": "synthetic", "num_videos": 2, "num_frames": 3, "image_size": [64, 64]}
    config = {
        "model_name_or_path": model,
        "train_data": [data],
        "eval_data": [{**data, "num_videos": 1, "seed": 5}],
        **{"num_frames": 3, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-3},
        **{"report_to": "none", "disable_tqdm": True, "output_dir": output, "push_to_hub": True},
        **{"hub_model_id": f"run-{strategy}", "hub_strategy": strategy, "hub_always_push": True},
    }
    with open(f"{output}.yaml", "w") as file:
        json.dump(config, file)
    load, change = ModelArguments.load, add_adapters if with_adapters else lambda model: model
    with mock.patch.object(ModelArguments, "load", lambda arguments: change(load(arguments))):
        trainer = build_trainer([f"{output}.yaml"])
    trainer.train()
    if strategy == "end":
        trainer.evaluate()
        trainer.push_to_hub(license="apache-2.0", dataset="tester/synthetic")
    trainer._finish_current_push()
    return same_tensors(trainer.model, SamoeModel.from_pretrained(f"tester/run-{strategy}", subfolder=subfolder or ""))
