"""A frozen base in 8 or 4 bits under its experts: `from_pretrained(..., quantization_config=...)`.

The model is loaded and checked as a whole. Then transformers quantizes the base model, which it knows, and the model's
linear layers go over to the quantized ones. So experts, routers, the gate and adapters stay as they are, any library
that transformers knows may be used, and what was trained is saved with the name and the fingerprint of the full base.
"""

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Sam2VideoModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .adapters import plain_name
from .configuration_samoe import SamoeConfig
from .errors import InputError
from .expert_layer import as_class, floating_type, is_expert_parameter, over_base, replace_module
from .weights_io import plain_tensors

# What libraries that work on quantized models look for.
MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
# By what name the libraries' configurations tell which layers stay as they are.
SKIP_FIELDS = ("modules_to_not_convert", "llm_int8_skip_modules")
# Layers of other widths stay as they are, since libraries quantize in groups of such a size. They are the first ones of
# the encoder and the last ones of the decoder, which hold few bytes.
WIDTH_MULTIPLE = 32
# The logger that tells at each call of an 8-bit layer that its inputs are cast.
BNB_8_BIT = "bitsandbytes.autograd._functions"


class QuantizedLinear(nn.Linear):
    """A layer that a library quantized, called in the one way that all of them can do: by rows, outside inference mode.

    Of inputs with more dimensions bitsandbytes' 8 bits scale the wrong ones on a CPU, and quanto's 4 bits know no
    inference mode.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        rows = hidden_states.flatten(0, -2)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                output = super().forward(rows)
        else:
            output = super().forward(rows)
        return output.unflatten(0, hidden_states.shape[:-1])


def check_not_quantized(source: Any, config: SamoeConfig) -> None:
    """Raises a `ValueError` if a folder or Hub id holds quantized weights."""
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{source} holds quantized weights. Load the full model, and give `quantization_config` to quantize it."
        )


def quantize_base(
    model: PreTrainedModel,
    quantization_config: QuantizationConfigMixin | Mapping[str, Any],
    device_map: Any = None,
) -> None:
    """Quantizes the linear layers of a SamoeModel in place, but for what belongs to experts.

    Args:
        model: with all its weights.
        quantization_config: of transformers, such as [`~transformers.BitsAndBytesConfig`], or its values.
        device_map: one device for the whole model; by default the quantizing library's.

    Raises:
        ValueError: if the library cannot quantize this model or on this device, or no layer is quantized.
        ImportError: if the library is not installed.
    """
    base = _quantized_base(model, _with_skips(model, quantization_config), device_map)
    devices = {parameter.device for parameter in base.parameters()}
    if len(devices) > 1:
        raise InputError(f"`device_map` must put a quantized model on one device, got {device_map!r}.")
    model.to(devices.pop())
    quantized = [name for name, module in base.named_modules() if _is_quantized(module)]
    if not quantized:
        raise InputError(f"`quantization_config` quantizes no layer of the model: {quantization_config}.")
    for name in quantized:
        layer, own = _callable(base.get_submodule(name)).requires_grad_(False), model.get_submodule(name)
        replace_module(model, name, layer if type(own) is nn.Linear else over_base(own, layer))
    for name in MARKS:
        if hasattr(base, name):
            setattr(model, name, getattr(base, name))
    model.quantized_layers = frozenset(quantized)
    logging.getLogger(BNB_8_BIT).addFilter(_without_repeated_casts)


def _with_skips(model: PreTrainedModel, quantization_config: Any) -> QuantizationConfigMixin:
    """A copy of a library's configuration, with the layers that stay as they are beside those that it names itself."""
    if not isinstance(quantization_config, QuantizationConfigMixin | Mapping):
        raise InputError(
            f"`quantization_config` must be one of transformers' or its values, got {quantization_config!r}."
        )
    if isinstance(quantization_config, Mapping):
        quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    quantization_config = copy.deepcopy(quantization_config)
    field = next((name for name in SKIP_FIELDS if hasattr(quantization_config, name)), None)
    if field is not None:
        layers = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
        odd = [name for name, x in layers if x.in_features % WIDTH_MULTIPLE or x.out_features % WIDTH_MULTIPLE]
        setattr(quantization_config, field, [*(getattr(quantization_config, field) or ()), *odd])
    return quantization_config


def _quantized_base(model: PreTrainedModel, quantization_config: Any, device_map: Any) -> Sam2VideoModel:
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not is_expert_parameter(name)}
    reports = []
    try:
        with without_load_report(reports):
            return Sam2VideoModel.from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict=tensors,
                dtype=model.dtype,
                quantization_config=quantization_config,
                device_map=device_map,
            )
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        # Of errors in a library, transformers tells in its report.
        causes = re.findall(r"^\w*(?:Error|Exception): .+", "\n".join(reports), flags=re.MULTILINE)
        cause = causes[0] if causes else error
        raise InputError(f"`quantization_config` cannot be used with this model and device: {cause}") from error


@contextmanager
def without_load_report(reports: list[str] | None = None) -> Iterator[None]:
    """Holds back transformers' report about missing tensors, which [`~checkpoints.check_weights`] judges more strictly.

    Args:
        reports: gets the reports.
    """
    library_logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report and reports is not None:
            reports.append(record.getMessage())
        return not is_report

    library_logger.addFilter(keep)
    try:
        yield
    finally:
        library_logger.removeFilter(keep)


def _without_repeated_casts(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.msg


def _callable(layer: nn.Linear) -> nn.Linear:
    """A quantized layer in the form in which the model calls it."""
    if type(layer) is nn.Linear:  # torchao, whose weights are tensors of a class of their own
        return layer
    layer = as_class(layer, QuantizedLinear)
    # bitsandbytes rearranges 4-bit weights at the first call that needs no gradient, and then gives none any more.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _is_quantized(module: nn.Module) -> bool:
    is_linear = isinstance(module, nn.Linear)
    return is_linear and (type(module) is not nn.Linear or type(module.weight.data) is not Tensor)


def check_can_be_trained(model: PreTrainedModel, names: set[str]) -> None:
    """Raises a `ValueError` if any of these parameters is quantized."""
    weights = {f"{layer}.weight" for layer in model.quantized_layers}
    if quantized := sorted(name for name in names if plain_name(name) in weights):
        raise InputError(
            f"{quantized[0]!r} is quantized and cannot be trained. Train experts or adapters, or leave such layers out "
            f"of the `quantization_config` ({' or '.join(map(repr, SKIP_FIELDS))})."
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, with what quantized weights need beside them, such as scales."""
    return _bytes({**dict(model.named_buffers()), **model.state_dict(keep_vars=True)})


def quantized_modules(model: PreTrainedModel) -> Iterator[nn.Linear]:
    """The quantized layers of a SamoeModel, also those that lie within an adapter of PEFT."""
    for layer in map(model.get_submodule, sorted(model.quantized_layers)):
        yield layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def spared_bytes(model: PreTrainedModel) -> int:
    """By how many bytes the quantized layers of a SamoeModel are smaller than in full."""
    spared = 0
    for layer in quantized_modules(model):
        tensors = layer.state_dict(keep_vars=True)
        own = {name for name in tensors if name == "bias" or is_expert_parameter(f".{name}")}
        held = _bytes({name: tensor for name, tensor in tensors.items() if name not in own})
        spared += layer.in_features * layer.out_features * floating_type(layer).itemsize - held
    return spared


def _bytes(tensors: Mapping[str, Any]) -> int:
    return sum(x.nbytes for _, x in plain_tensors(tensors.items()) if isinstance(x, Tensor))


def in_full(layer: nn.Linear) -> nn.Linear:
    """A quantized layer as it was before, with its experts, but without the values of its weight."""
    full = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=floating_type(layer))
    full.requires_grad_(False)
    return over_base(layer, full) if hasattr(layer, "base_class") else full
