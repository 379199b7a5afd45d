"""The summary of a model's parameters and experts, and what is said of new experts."""

from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from samoe_hf import SamoeModel
from samoe_hf.model.expert_layer import is_expert_parameter

LOGGER = "transformers.samoe_hf.model.loading"


def count(model, chosen):
    return sum(tensor.numel() for name, tensor in model.named_parameters() if chosen(name, tensor))


def test_a_summary_counts_every_parameter_once(model_folder):
    model = SamoeModel.from_pretrained(model_folder)
    summary = model.summary()
    (experts,) = summary.experts
    assert summary.total == count(model, lambda *_: True) == summary.trainable + summary.frozen
    assert summary.trainable == count(model, lambda _, tensor: tensor.requires_grad) == experts.parameters
    assert experts.domain is None and experts.modules == model.expert_module_names
    config = model.config
    assert (experts.num_experts, experts.num_experts_per_tok) == (config.num_experts, config.num_experts_per_tok)
    assert (experts.lora_rank, experts.lora_alpha) == (config.lora_rank, config.lora_alpha)
    text = str(summary)
    for number in (summary.total, summary.trainable, summary.frozen):
        assert f"{number:,d}" in text
    assert f"rank {config.lora_rank}, alpha {config.lora_alpha}" in text and experts.modules[0] in text
    model.set_trainable("all")
    assert model.summary().frozen == 0


def said_while_loading(source, **options):
    with CaptureLogger(logging.get_logger(LOGGER)) as captured:
        model = SamoeModel.from_pretrained(source, **options)
    return model, captured.out


def test_new_experts_are_told_in_one_line(base_folder, capsys):
    model, said = said_while_loading(base_folder)
    new = [name for name, _ in model.named_parameters() if is_expert_parameter(name)]
    told = "they are new, and have no effect until they are trained."
    assert said == f"{len(new)} expert tensors are not in {base_folder}: {told}\n"
    assert "LOAD REPORT" not in "".join(capsys.readouterr())


def test_one_line_is_said_where_something_is_new_and_else_none(model_folder, base_folder, tmp_path):
    assert said_while_loading(model_folder)[1] == ""
    SamoeModel.from_pretrained(base_folder).save_pretrained(tmp_path, experts_only=True)
    assert said_while_loading(tmp_path)[1] == ""
    more = ["memory_attention.layers.*.linear1", "memory_attention.layers.*_proj"]
    assert said_while_loading(tmp_path, expert_modules=more)[1].count("\n") == 1
