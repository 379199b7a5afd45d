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

from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .adapters import plain_name
from .base import base_of, config_of_base
from .base_model import SamoePreTrainedModel, building
from .errors import InputError
from .expert_layer import META, BaseLinear, QuantizedProduct, is_expert_parameter, replace_module
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


def quantize_base(
    model: SamoePreTrainedModel,
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
    nn.Module.to(model, devices.pop())
    quantized = [name for name, module in base.named_modules() if _is_quantized(module)]
    if not quantized:
        raise InputError(f"`quantization_config` quantizes no layer of the model: {quantization_config}.")
    for name in quantized:
        layer, own = base.get_submodule(name), model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if not isinstance(own, BaseLinear):
            own = BaseLinear(layer.in_features, layer.out_features, device=META)
            replace_module(model, name, own)
        own.take_over(layer.requires_grad_(False))
        if type(layer) is not nn.Linear:  # torchao's are, whose weights are tensors of a class of their own
            # bitsandbytes rearranges 4-bit weights at the first call that needs no gradient, and then gives none.
            vars(layer)["support_avx512bf16_for_cpu"] = False
            own.quantized = (QuantizedProduct(layer),)
    for name in MARKS:
        if hasattr(base, name):
            setattr(model, name, getattr(base, name))
    model.origin.quantized = frozenset(quantized)
    logging.getLogger(BNB_8_BIT).addFilter(_without_repeated_casts)


def _with_skips(model: SamoePreTrainedModel, quantization_config: Any) -> QuantizationConfigMixin:
    """A copy of a library's configuration, with the layers that stay as they are beside those that it names itself."""
    if not isinstance(quantization_config, QuantizationConfigMixin | Mapping):
        raise InputError(
            f"`quantization_config` must be one of transformers' or its values, got {quantization_config!r}."
        )
    if isinstance(quantization_config, Mapping):
        try:
            quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise InputError(
                f"`quantization_config` must hold what `to_dict()` of one of transformers' gives, got "
                f"{dict(quantization_config)} ({error!r})."
            ) from error
    quantization_config = copy.deepcopy(quantization_config)
    field = next((name for name in SKIP_FIELDS if hasattr(quantization_config, name)), None)
    if field is not None:
        layers = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
        odd = [name for name, x in layers if x.in_features % WIDTH_MULTIPLE or x.out_features % WIDTH_MULTIPLE]
        setattr(quantization_config, field, [*(getattr(quantization_config, field) or ()), *odd])
    return quantization_config


def _quantized_base(model: SamoePreTrainedModel, quantization_config: Any, device_map: Any) -> PreTrainedModel:
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not is_expert_parameter(name)}
    with building, without_load_report() as reports:
        try:
            config = config_of_base(model.config)
            kind: Any = base_of(model.config).quantized_class or MODEL_MAPPING[type(config)]
            return kind.from_pretrained(
                None,
                config=config,
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
def without_load_report() -> Iterator[list[str]]:
    """Holds back transformers' report of missing tensors, and yields a list that gets it.

    [`~weights_check.check_weights`] judges more strictly.
    """
    library_logger = logging.getLogger("transformers.modeling_utils")
    reports: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            reports.append(record.getMessage())
        return not is_report

    library_logger.addFilter(keep)
    try:
        yield reports
    finally:
        library_logger.removeFilter(keep)


def _without_repeated_casts(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.msg


def _is_quantized(module: nn.Module) -> bool:
    is_linear = isinstance(module, nn.Linear)
    return is_linear and (type(module) is not nn.Linear or type(module.weight.data) is not Tensor)


def check_can_be_trained(model: SamoePreTrainedModel, names: set[str]) -> None:
    """Raises a `ValueError` if any of these parameters is quantized."""
    weights = {f"{layer}.weight" for layer in model.origin.quantized}
    if quantized := sorted(name for name in names if plain_name(name) in weights):
        raise InputError(
            f"{quantized[0]!r} is quantized and cannot be trained. Train experts or adapters, or leave such layers out "
            f"of the `quantization_config` ({' or '.join(map(repr, SKIP_FIELDS))})."
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, with what quantized weights need beside them, such as scales."""
    tensors = {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}
    for name, module in model.named_modules():
        if isinstance(module, BaseLinear) and module.quantized is not None:
            del tensors[f"{name}.weight"]
            held = module.quantized[0].layer.state_dict(keep_vars=True)
            tensors |= {f"{name}.{key}": tensor for key, tensor in held.items() if key != "bias"}
    return sum(x.nbytes for _, x in plain_tensors(tensors.items()) if isinstance(x, Tensor))
