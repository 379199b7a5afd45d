"""Surgery on experts: what is preserved, what is learned afterwards, and that files tell all of it."""

import copy
import functools

import pytest
import torch
from torch import nn

from helpers.reference import assert_same_tensors, attend, load_reference, track_reference
from samoe_hf import SamoeModel
from samoe_hf.analysis.routing import route_all_to
from samoe_hf.model.expert_layer import EXPERT_TENSORS, expert_modules
from samoe_hf.model.expert_sleep import ASLEEP, frozen_experts
from samoe_hf.surgery.experts import (
    freeze_experts,
    grow_experts,
    merge_experts,
    prune_experts,
    replace_experts,
    reset_expert,
)


def expert_tensor(module, name):
    """A stacked tensor, such as "router.weight"."""
    return functools.reduce(getattr, name.split("."), module)


def tensors(module, expert):
    return {name: expert_tensor(module, name).detach()[expert].clone() for name in EXPERT_TENSORS}


def all_rows(model, expert):
    return {name: tensors(module, expert) for name, module in expert_modules(model)}


def same(first, second):
    return all(torch.equal(first[name][key], second[name][key]) for name in first for key in EXPERT_TENSORS)


def set_top_k(model, num_experts_per_tok):
    model.config.num_experts_per_tok = num_experts_per_tok
    for _, module in expert_modules(model):
        module.num_experts_per_tok = num_experts_per_tok


@torch.no_grad()
def duplicate(model, source, target):
    """Makes `target` the same expert as `source`, router row included."""
    for _, module in expert_modules(model):
        for name in EXPERT_TENSORS:
            expert_tensor(module, name)[target] = expert_tensor(module, name)[source]


def train_step(model, clip, **options):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    for _ in range(2):
        model.train()(*clip).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_growing_preserves_the_output_until_trained(nano, model, clip):
    expected = track_reference(nano.model, nano.folder, nano.load("tracking")["pixel_values"])[0]
    assert grow_experts(model, 2) == [4, 5]
    assert model.config.num_experts == 6
    torch.testing.assert_close(attend(model), attend(nano.model), atol=1e-6, rtol=1e-6)
    logits = track_reference(model, nano.folder, nano.load("tracking")["pixel_values"])[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert same(all_rows(model, slice(0, 4)), all_rows(nano.model, slice(0, 4)))
    # A training step wakes them, and they learn.
    before = all_rows(model, slice(4, 6))
    train_step(model, clip)
    after = all_rows(model, slice(4, 6))
    moved = [name for name in after if after[name]["lora_B"].any() and after[name]["router.bias"].min() > ASLEEP / 2]
    assert len(moved) > 0.9 * len(after)
    assert any(not torch.equal(before[name]["lora_A"], after[name]["lora_A"]) for name in after)


def test_only_training_experts_wakes_those_that_sleep_also_in_loaded_tensors(model, clip):
    def biases():
        return [module.router.bias[4].item() for _, module in expert_modules(model)]

    grow_experts(model, 1)
    asleep = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.train()(*clip)
    model.eval()(*clip)
    model.set_trainable("decoder")
    model.train()(*clip)
    assert set(biases()) == {ASLEEP}
    model.set_trainable("experts")
    for _ in range(2):
        model.train()(*clip)
        assert min(biases()) > ASLEEP / 2
        model.load_state_dict(asleep)
        assert set(biases()) == {ASLEEP}


def test_woken_experts_depend_on_the_seed_and_on_nothing_else(nano):
    def woken(seed, draws=0):
        torch.manual_seed(seed)
        torch.rand(draws)  # processes of a run may have drawn differently often
        model = copy.deepcopy(nano.model)
        grow_experts(model, 2)
        model.wake_experts()
        return all_rows(model, slice(4, 6))

    first, again, other = woken(0), woken(0, draws=7), woken(1)
    for name in first:
        assert torch.equal(first[name]["router.weight"], again[name]["router.weight"])
        assert not torch.equal(first[name]["router.weight"], other[name]["router.weight"])
    rows = [rows["router.weight"] for rows in first.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i]), "layers have rows of their own"


@pytest.mark.parametrize(("num_experts_per_tok", "stay"), [(1, {"keep": [2, 0]}), (2, {"drop": [1, 3]})])
def test_pruning_unused_experts_preserves_the_output(nano, model, num_experts_per_tok, stay):
    set_top_k(model, num_experts_per_tok)
    with torch.no_grad():
        for _, module in expert_modules(model):
            module.router.bias[[1, 3]] = -1000.0
    expected = attend(model)
    prune_experts(model, **stay)
    assert model.config.num_experts == 2 and not torch.equal(expected, attend(nano.model))
    torch.testing.assert_close(attend(model), expected, atol=1e-6, rtol=1e-6)
    assert same(all_rows(model, 0), all_rows(nano.model, 0))
    module = model.get_submodule(model.expert_module_names[0])
    assert module.num_experts == len(module.router.weight) == 2 and module.lora_A.requires_grad


def test_pruning_by_usage_keeps_each_layers_most_used(nano, model):
    usage = {
        name: torch.rand(4, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(model.expert_module_names)
    }
    prune_experts(model, usage=usage, num_experts=3)
    least = set()
    for name, module in expert_modules(model):
        kept = [expert for expert in range(4) if expert != usage[name].argmin()]
        least.add(int(usage[name].argmin()))
        for name_of_tensor in EXPERT_TENSORS:
            original = nano.model.get_submodule(name).get_parameter(name_of_tensor)
            assert torch.equal(expert_tensor(module, name_of_tensor), original[kept])
    assert len(least) > 1


@pytest.mark.parametrize("num_experts_per_tok", [1, 4])
def test_merging_equal_experts_preserves_the_output(nano, model, num_experts_per_tok):
    set_top_k(model, num_experts_per_tok)
    duplicate(model, 1, 3)
    expected = attend(model)
    assert merge_experts(model, [3, 1]) == 1
    assert model.config.num_experts == 3
    assert model.config.num_experts_per_tok == min(num_experts_per_tok, 3)
    torch.testing.assert_close(attend(model), expected, atol=1e-6, rtol=1e-6)
    assert same(all_rows(model, [0, 2]), all_rows(nano.model, [0, 2]))


def test_merging_averages_the_products_as_well_as_the_rank_allows(nano, model):
    usage = {name: torch.tensor([3.0, 0.0, 1.0, 0.0]) for name in model.expert_module_names}
    merge_experts(model, [0, 2], usage=usage)
    for name, module in expert_modules(model):
        original = nano.model.get_submodule(name)
        products = (original.lora_B @ original.lora_A).double()
        mean = 0.75 * products[0] + 0.25 * products[2]
        singular = torch.linalg.svdvals(mean)
        error = torch.linalg.svdvals((module.lora_B[0] @ module.lora_A[0]).double() - mean)
        torch.testing.assert_close(error[0], singular[4], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(
            module.router.weight[0], 0.75 * original.router.weight[0] + 0.25 * original.router.weight[2]
        )
    # Merged experts that are new can still learn.
    for _, module in expert_modules(model):
        nn.init.zeros_(module.lora_B)
    merge_experts(model, [0, 1])
    module = model.get_submodule(model.expert_module_names[0])
    assert module.lora_B.abs().max() == 0 < module.lora_A[0].abs().max()


def test_a_reset_expert_does_nothing_and_the_others_stay(nano, model, clip):
    reset_expert(model, 2)
    with route_all_to(model, 2):
        result = attend(model)
    plain = copy.deepcopy(nano.model)
    for _, module in expert_modules(plain):
        nn.init.zeros_(module.lora_B)
    torch.testing.assert_close(result, attend(plain), atol=1e-12, rtol=0)
    assert same(all_rows(model, [0, 1, 3]), all_rows(nano.model, [0, 1, 3]))
    rows, old = all_rows(model, 2), all_rows(nano.model, 2)
    assert not any(torch.equal(rows[name][key], old[name][key]) for name in rows for key in EXPERT_TENSORS)


def test_frozen_experts_stay_to_the_bit_and_others_learn(nano, model, clip):
    freeze_experts(model, [0, 3])
    model = copy.deepcopy(model)
    train_step(model, clip, weight_decay=0.1)
    assert same(all_rows(model, [0, 3]), all_rows(nano.model, [0, 3]))
    rows, old = all_rows(model, [1, 2]), all_rows(nano.model, [1, 2])
    assert not any(torch.equal(rows[name]["lora_B"], old[name]["lora_B"]) for name in rows)
    model.train()(*clip).loss.backward()
    module = model.get_submodule(model.expert_module_names[0])
    gradient = next(parameter.grad for name, parameter in module.named_parameters() if "lora_B" in name)
    assert gradient[[0, 3]].abs().max() == 0 < gradient[[1, 2]].abs().max()
    # With momentum gathered before, and what was loaded after freezing.
    freeze_experts(model, [])
    optimizer = torch.optim.AdamW([module.lora_B], lr=1e-2, weight_decay=0.1)
    module.lora_B.grad = torch.ones_like(module.lora_B)
    optimizer.step()
    freeze_experts(model, [0])
    model.load_state_dict(nano.model.state_dict())
    optimizer.step()
    loaded = nano.model.get_submodule(model.expert_module_names[0]).lora_B
    assert torch.equal(module.lora_B[0], loaded[0]) and not torch.equal(module.lora_B[1], loaded[1])


OPERATIONS = {
    "prune": lambda model: prune_experts(model, keep=[1, 2, 3]),
    "grow": lambda model: grow_experts(model, 2),
    "merge": lambda model: merge_experts(model, [0, 1]),
    "replace": lambda model: replace_experts(model, expert_modules=["qkv"], lora_rank=2),
}


def test_freezing_goes_through_surgery(model):
    freeze_experts(model, [1, 3])
    prune_experts(model, keep=[0, 2, 3])
    assert all(frozen_experts(module) == [2] for _, module in expert_modules(model))
    for change in (lambda: reset_expert(model, 2), lambda: merge_experts(model, [1, 2])):
        with pytest.raises(ValueError, match="frozen"):
            change()
    model.set_trainable("decoder")
    model.set_trainable("experts")
    kept = all_rows(model, 2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.get_submodule(model.expert_module_names[0]).router(torch.ones(128)).sum().backward()
    optimizer.step()
    assert same(all_rows(model, 2), kept)


@pytest.mark.parametrize(
    ("operation", "experts_only"), [("grow", False), *((operation, True) for operation in OPERATIONS)]
)
def test_what_was_operated_on_is_saved_and_loaded(model_folder, tmp_path, operation, experts_only):
    """The base that the files name has another number of experts than they have."""
    model = SamoeModel.from_pretrained(model_folder)
    OPERATIONS[operation](model)
    model.save_pretrained(tmp_path, experts_only=experts_only)
    loaded = SamoeModel.from_pretrained(tmp_path)
    assert loaded.config.num_experts == model.config.num_experts
    assert_same_tensors(loaded, model)
    torch.testing.assert_close(attend(loaded), attend(model), atol=0, rtol=0)


def test_experts_are_replaced_by_new_ones_elsewhere():
    model = load_reference("nano", with_experts=False).model
    before = attend(model)
    names = ["vision_encoder.backbone.blocks.0.attn.qkv", model.expert_module_names[0]]
    replace_experts(model, expert_modules=names, num_experts=3, lora_rank=2, lora_alpha=2.0)
    assert sorted(model.expert_module_names) == sorted(names) == sorted(n for n, _ in expert_modules(model))
    assert torch.equal(attend(model), before)
    module = model.get_submodule(names[0])
    assert module.lora_A.shape[:2] == (3, 2) and module.scaling == 1 and not module.training


@pytest.mark.parametrize(
    "operate, message",
    [
        (lambda m: prune_experts(m), "Exactly one of `keep`, `drop` and `usage`"),
        (lambda m: prune_experts(m, keep=[0]), "1 experts cannot stay: from `num_experts_per_tok`"),
        (lambda m: prune_experts(m, keep=[0, 4]), "`keep` must be integers from 0 to 3, got 4"),
        (lambda m: prune_experts(m, keep=[0, 0, 1]), "`keep` must be different experts"),
        (lambda m: prune_experts(m, usage={}, num_experts=2), "`usage` must have 4 values for 'memory"),
        (lambda m: prune_experts(m, usage={}), "`num_experts`, the number of experts that stay"),
        (lambda m: merge_experts(m, [1]), "at least two experts"),
        (lambda m: grow_experts(m, 0), "`num_new` must be an integer of at least 1, got 0"),
        (lambda m: reset_expert(m, -1), "`expert` must be integers from 0 to 3, got -1"),
        (lambda m: freeze_experts(m, [7]), "`experts` must be integers from 0 to 3, got 7"),
        (lambda m: replace_experts(m, expert_modules=["nowhere"]), "'nowhere'"),
        (lambda m: replace_experts(m, top_k=1), r"`settings` must be among .* got 'top_k'"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changed(nano, model, operate, message):
    with pytest.raises(ValueError, match=message):
        operate(model)
    assert_same_tensors(model, nano.model)
    assert model.config.to_dict() == nano.model.config.to_dict()
