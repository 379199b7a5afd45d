"""A base in 8 or 4 bits under experts as they are: the three libraries, what is trained, saved and loaded."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, Sam2VideoModel, TorchAoConfig

from helpers.edgetam import slow_over_bases
from helpers.reference import assert_same_tensors
from samoe_hf import SamoeModel
from samoe_hf.errors import InputError
from samoe_hf.model.domain_experts import DomainLinear
from samoe_hf.model.expert_layer import ExpertLinear, expert_modules, is_expert_parameter
from samoe_hf.model.weights_io import plain_tensors
from samoe_hf.surgery.domains import add_domain, merge_domains, remove_domain


def bitsandbytes(bits, **options):
    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)


def torchao(bits, **options):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    # What torchao holds in 4 bits on a GPU it has no kernel for on a CPU; there it rounds to as many values.
    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else four, **options)


LIBRARIES = {"bitsandbytes": bitsandbytes, "torchao": torchao}


@pytest.fixture(
    params=[
        ("bitsandbytes", 4),
        *(pytest.param(x, marks=pytest.mark.slow) for x in (("bitsandbytes", 8), ("torchao", 4), ("torchao", 8))),
    ],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def quantization(request):
    """How to quantize, and the size of its error."""
    library, bits = request.param
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}, of the extra `quantization`")
    return lambda **options: LIBRARIES[library](bits, **options)


@pytest.fixture(scope="module")
def clip():
    """A clip of two objects: (pixel_values, labels)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(1, 2, 3, 128, 128, dtype=torch.bool)
    for frame in range(3):
        labels[0, 0, frame, 16 + 8 * frame : 60 + 8 * frame, 12:60] = True
        labels[0, 1, frame, 20:80, 80 - 6 * frame : 120 - 6 * frame] = True
    pixels = torch.randn(1, 3, 3, 128, 128, generator=generator) / 4 + labels.any(1)[:, :, None].float()
    return pixels, labels


def plain_weights(model):
    return {name: tensor.clone() for name, tensor in plain_tensors(model.state_dict().items())}


@slow_over_bases
def test_the_base_is_quantized_and_what_belongs_to_experts_is_not(quantization, model_folder, clip):
    full = SamoeModel.from_pretrained(model_folder)
    model = SamoeModel.from_pretrained(model_folder, quantization_config=quantization())
    layers = {name for name, module in full.named_modules() if isinstance(module, nn.Linear)}
    wide = {name for name in layers if min(full.get_submodule(name).weight.shape) >= 32}
    assert model.origin.quantized and model.origin.quantized >= wide & set(model.expert_module_names)
    assert model.expert_module_names == full.expert_module_names
    assert {type(module) for name, module in model.named_modules() if name in layers - model.origin.quantized} <= {
        nn.Linear,
        ExpertLinear,
    }
    for (name, module), (_, expected) in zip(expert_modules(model), expert_modules(full), strict=True):
        assert isinstance(module, ExpertLinear) and module.extra_repr() == expected.extra_repr(), name
        for tensor, other in zip(
            (module.lora_A, module.lora_B, *module.router.parameters()),
            (expected.lora_A, expected.lora_B, *expected.router.parameters()),
            strict=True,
        ):
            assert torch.equal(tensor, other) and tensor.requires_grad
    assert all(p.requires_grad == is_expert_parameter(name) for name, p in model.named_parameters())
    spared = full.summary().bytes - model.summary().bytes
    wide_bytes = sum(full.get_submodule(name).weight.nbytes for name in model.origin.quantized)
    assert 0.6 * wide_bytes < spared < wide_bytes
    assert model.summary().total == full.summary().total
    with torch.no_grad():
        quantized, expected = (m.eval()(*clip, prompts="mask").pred_masks for m in (model, full))
    error = (quantized - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.2


@slow_over_bases
def test_experts_learn_over_it_and_are_saved_alone_for_the_full_base(quantization, model_folder, tmp_path, clip):
    full = SamoeModel.from_pretrained(model_folder)
    model = SamoeModel.from_pretrained(model_folder, quantization_config=quantization())
    before = plain_weights(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(2):
        with torch.no_grad():  # evaluation in between must not change what comes after
            model.eval()(*clip, prompts="mask")
        model.train()(*clip, prompts="mask").loss.backward()
        optimizer.step()
    changed = {name for name, tensor in plain_weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed and all(is_expert_parameter(name) for name in changed)
    model.save_pretrained(tmp_path / "experts")
    assert all(is_expert_parameter(name) for name in load_file(tmp_path / "experts" / "model.safetensors"))
    loaded = SamoeModel.from_pretrained(tmp_path / "experts")
    assert not loaded.origin.quantized
    learned = {name: tensor for name, tensor in model.named_parameters() if is_expert_parameter(name)}
    assert_same_tensors(loaded, full, learned)
    again = SamoeModel.from_pretrained(tmp_path / "experts", quantization_config=quantization())
    for (name, tensor), other in zip(plain_weights(again).items(), plain_weights(model).values(), strict=True):
        assert torch.equal(tensor, other), name
    with pytest.raises(ValueError, match="`experts_only` must be True"):
        model.save_pretrained(tmp_path / "whole", experts_only=False)
    assert not (tmp_path / "whole").exists()


def test_quantized_weights_cannot_be_made_trainable(quantization, model_folder):
    model = SamoeModel.from_pretrained(model_folder, quantization_config=quantization())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"weight' is quantized .*llm_int8_skip_modules"):
        model.set_trainable("memory")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    config = quantization()
    field = "llm_int8_skip_modules" if hasattr(config, "llm_int8_skip_modules") else "modules_to_not_convert"
    skipping = quantization(**{field: ["memory_attention", "memory_encoder", "object_pointer_proj", "mask_decoder"]})
    model = SamoeModel.from_pretrained(model_folder, quantization_config=skipping)
    assert all(name.startswith(("vision_encoder", "temporal_pos")) for name in model.origin.quantized)
    model.set_trainable("experts", "mask_decoder.*")


def test_domains_come_and_go_over_a_quantized_base(quantization, model_folder, tmp_path, clip):
    full = SamoeModel.from_pretrained(model_folder, num_experts=2, lora_rank=2, ignore_mismatched_sizes=True)
    model = SamoeModel.from_pretrained(
        model_folder, num_experts=2, lora_rank=2, ignore_mismatched_sizes=True, quantization_config=quantization()
    )
    with torch.no_grad():
        base = model.eval()(*clip, prompts="mask").pred_masks
    add_domain(model, "one")
    layer = next(module for module in model.modules() if isinstance(module, DomainLinear))
    assert layer.domain_one.lora_A.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(*clip, prompts="mask", domain="one").pred_masks, base)
        layer.domain_one.lora_B.fill_(0.5)
        assert not torch.equal(model(*clip, prompts="mask", domain="one").pred_masks, base)
        assert torch.equal(model(*clip, prompts="mask", domain=None).pred_masks, base)
    model.save_pretrained(tmp_path / "one", experts_only=True)
    assert SamoeModel.from_pretrained(tmp_path / "one").config.domain_names == ["one"]
    add_domain(full, "two")
    assert merge_domains(model, full) == ["two"]
    remove_domain(model, "one")
    remove_domain(model, "two")
    assert not any(isinstance(module, DomainLinear) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(*clip, prompts="mask").pred_masks, base)


def test_what_cannot_be_quantized_is_told(nano, model_folder, tmp_path):
    for wrong in ("int8", {"load_in_8bit": False}):
        with pytest.raises(ValueError, match="quant"):
            SamoeModel.from_pretrained(model_folder, quantization_config=wrong)
    outdated = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    for wrong in (outdated, {"quant_method": "bitsandbytes", "load_in_4bit": "yes"}, {"quant_method": "none such"}):
        with pytest.raises(InputError, match="`quantization_config` must hold what `to_dict"):
            SamoeModel.from_pretrained(model_folder, quantization_config=wrong)
    weights = {"config": nano.model.config, "state_dict": nano.model.state_dict()}
    with pytest.raises(ValueError, match="needs `pretrained_model_name_or_path`"):
        SamoeModel.from_pretrained(None, **weights, quantization_config=bitsandbytes(8))
    torchao = pytest.importorskip("torchao.quantization")
    groups = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(96))
    with pytest.raises(ValueError, match=r"`quantization_config` cannot be used with this model .*divisible by"):
        SamoeModel.from_pretrained(model_folder, quantization_config=TorchAoConfig(groups))
    pytest.importorskip("bitsandbytes")
    Sam2VideoModel.from_pretrained(model_folder, quantization_config=bitsandbytes(8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds quantized weights"):
        SamoeModel.from_pretrained(tmp_path)


def test_gradients_are_those_over_the_dequantized_weights(model_folder, clip):
    bnb = pytest.importorskip("bitsandbytes")
    model = SamoeModel.from_pretrained(model_folder, quantization_config=bitsandbytes(4)).eval()
    full = SamoeModel.from_pretrained(model_folder).eval()
    for name in model.origin.quantized:
        weight = model.get_submodule(name).weight
        full.get_submodule(name).weight.data.copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
    for m in (model, full):
        m(*clip, prompts="mask").loss.backward()
    for name, parameter in full.named_parameters():
        if parameter.requires_grad:
            own = model.get_parameter(name).grad
            assert (own - parameter.grad).norm() <= 1e-3 * parameter.grad.norm(), name
