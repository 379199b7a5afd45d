"""Loads a model from the Hub by its own code where the package is not installed; imports come late for that."""


def pull(repo_id: str, expected: str, cache: str) -> dict:
    """Loads a model by its own code, or the package's where it is installed, and compares it with what was pushed."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(repo_id, trust_remote_code=True, cache_dir=cache)
    return compare(model, AutoProcessor.from_pretrained(repo_id, cache_dir=cache), expected)


def compare(model, processor, expected: str) -> dict:
    """Compares a model with what was pushed."""
    import torch

    saved = torch.load(expected, weights_only=True)
    pixel_values, boxes = saved["inputs"]
    with torch.no_grad():
        masks = model(pixel_values, input_boxes=boxes).pred_masks
    tensors = model.state_dict()
    same = tensors.keys() == saved["tensors"].keys()
    return {
        "module": type(model).__module__.split(".")[0],
        "processor": [type(processor).__name__, processor.video_processor.size["height"]],
        "same": same and all(torch.equal(x, saved["tensors"][name]) for name, x in tensors.items()),
        "difference": (masks - saved["masks"]).abs().max().item(),
    }
