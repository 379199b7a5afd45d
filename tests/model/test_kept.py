"""What is kept while a video is propagated: it changes no mask, and nothing of it is ever out of date."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.modules.module import register_module_full_backward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.domains import add_learned_domain, new_model
from samoe_hf.model.domain_experts import DomainLinear, use_domain
from samoe_hf.model.expert_layer import ExpertLinear, expert_modules
from samoe_hf.model.expert_router import record_router_logits
from samoe_hf.model.joint_linear import run_jointly
from samoe_hf.model.kept import keep, keep_between, keep_for_clip
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import remove_domain

SETTINGS = {"num_experts": 4, "num_experts_per_tok": 2, "lora_rank": 3, "lora_alpha": 6.0}


class Operations(TorchDispatchMode):
    """Counts operations, views and allocations too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def steps(*functions):
    """What functions give, one after another, as steps that keep values for each other."""
    with torch.inference_mode():
        return list(keep_between(function() for function in functions))


# Of values


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "a state dict": lambda layer: layer.load_state_dict({"weight": layer.weight * 2}),
    "assigned": lambda layer: layer.load_state_dict({"weight": layer.weight * 2}, assign=True),
    "other data": lambda layer: setattr(layer.weight, "data", layer.weight * 2),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
    "another type": lambda layer: layer.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_value_is_computed_again_when_and_only_when_a_weight_has_changed(change):
    layer, computed = nn.Linear(3, 2, bias=False), []

    def value():
        def compute():
            computed.append(1)
            return layer.weight.float().sum() * 3

        return keep("name", [layer.weight], compute).item(), layer.weight.float().sum().item() * 3

    def changed():
        with torch.inference_mode(False), torch.no_grad():
            change(layer)
        return value()

    values = steps(value, value, changed, value)
    assert len(computed) == 2
    for found, expected in values:
        assert found == pytest.approx(expected)


def test_nothing_is_kept_after_the_last_step_between_steps_or_where_gradients_are_computed():
    weight, computed = nn.Parameter(torch.ones(2)), []

    def value():
        return keep("name", [weight], lambda: computed.append(1))

    steps(value)
    steps(value)
    assert len(computed) == 2
    for context, expected in ((torch.no_grad, 4), (torch.enable_grad, 8)):
        with context():
            for _ in keep_between(value() for _ in range(2)):
                value()
        assert len(computed) == expected + 1


def test_other_settings_are_another_value_and_so_is_autocast():
    weight, computed = nn.Parameter(torch.ones(2)), []

    def value(of=None):
        return keep("name", [weight], lambda: computed.append(1), of)

    def in_half():
        with torch.autocast("cpu", torch.bfloat16):
            value("a")

    steps(lambda: value("a"), lambda: value("a"), lambda: value("b"), lambda: value("a"), in_half, in_half)
    assert len(computed) == 4


# Of layers


def layers_of(kind, bias=True):
    torch.manual_seed(0)
    plain = [nn.Linear(8, 6, bias=bias) for _ in range(3)]
    if kind == "plain":
        return plain
    settings = SETTINGS | ({"num_experts": 1, "num_experts_per_tok": 1} if kind == "one expert" else {})
    if kind == "domain":
        layers = [DomainLinear.from_linear(x) for x in plain]
        for layer in layers:
            layer.add_domain("night", **settings)
    else:
        layers = [ExpertLinear.from_linear(x, **settings) for x in plain]
    for layer in layers:
        for _, experts in expert_modules(layer):
            nn.init.normal_(experts.lora_B, std=0.3)
    return layers


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "one expert", "experts", "domain"])
def test_layers_give_together_what_each_gives_alone(kind, bias, mode):
    layers = [
        layer.eval().to(torch.bfloat16 if mode == "bfloat16" else torch.float32) for layer in layers_of(kind, bias)
    ]
    hidden_states = torch.randn(2, 5, 8, dtype=layers[0].weight.dtype)

    def together():
        with use_domain("night"), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            return run_jointly(layers, hidden_states)

    with torch.no_grad(), Operations() as apart:
        expected = together()
    with Operations() as joint:  # three times, and what is kept
        *_, found = steps(together, together, together)
    assert joint.count < 3 * apart.count
    for own, alone in zip(found, expected, strict=True):
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if mode == "float32" else {"rtol": 3e-2, "atol": 3e-2}
        torch.testing.assert_close(own, alone, **tolerance)


@pytest.mark.parametrize("unlike", ["size", "settings", "hook", "router's hook", "dropout", "forward"])
def test_layers_that_are_unlike_or_watched_give_what_each_gives_alone(unlike):
    layers, seen = [layer.eval() for layer in layers_of("experts")], []
    if unlike == "size":
        layers[1] = nn.Linear(8, 5).eval()
    elif unlike == "settings":
        layers[1].scaling *= 2
    elif unlike == "hook":
        layers[1].register_forward_hook(lambda _, __, output: seen.append(1) or -output)
    elif unlike == "router's hook":
        layers[1].router_logits.register_forward_hook(lambda _, __, logits: seen.append(logits) or -logits)
    elif unlike == "dropout":
        layers[1].train().dropout.p = 0.5
    else:
        layers[1].forward = lambda hidden_states: hidden_states[..., :6] * 0
    hidden_states = torch.randn(4, 8)

    def together():
        torch.manual_seed(0)
        return run_jointly(layers, hidden_states)

    with torch.no_grad():
        torch.manual_seed(0)
        expected = [layer(hidden_states) for layer in layers]
    for found in steps(together, together):
        for own, alone in zip(found, expected, strict=True):
            torch.testing.assert_close(own, alone, **({} if "router" in unlike else {"rtol": 0, "atol": 0}))
    assert len(seen) == (3 if "hook" in unlike else 0)
    if "router" in unlike:
        torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("of_all", [False, True], ids=["layer", "all modules"])
def test_hooks_of_gradients_run(of_all):
    layers, seen = layers_of("experts"), []
    register = register_module_full_backward_pre_hook if of_all else layers[1].register_full_backward_pre_hook
    watch = register(lambda module, gradient: seen.append(module))
    with keep_for_clip():
        torch.cat(list(run_jointly(layers, torch.randn(2, 8, requires_grad=True)))).sum().backward()
    watch.remove()
    assert seen.count(layers[1]) == 1


@pytest.mark.parametrize("kind", ["plain", "one expert", "experts", "domain", "watched"])
def test_layers_of_a_clip_have_the_gradients_that_each_has_alone(kind):
    layers, inputs = [layer.double() for layer in layers_of(kind.replace("watched", "experts"))], []
    if kind == "watched":
        layers[0].router_logits.register_forward_hook(lambda _, __, logits: inputs.append(logits) or logits * 2)
    first, second = (torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def gradients(run):
        with use_domain("night"):
            outputs = torch.cat([*run(first), *run(second)])
            weights = [x for layer in layers for x in layer.parameters()]
            return torch.autograd.grad(outputs.sin().sum(), [first, second, *weights])

    expected = gradients(lambda x: [layer(x) for layer in layers])
    with keep_for_clip(), Operations() as joint:
        found = gradients(lambda x: run_jointly(layers, x))
    for own, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(own, alone)
    with Operations() as apart:
        gradients(lambda x: run_jointly(layers, x))
    assert joint.count < apart.count
    assert len(inputs) == (6 if kind == "watched" else 0)


def test_dropout_of_layers_of_a_clip_is_drawn_for_each():
    layers = [layer.train() for layer in layers_of("experts")]
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
        layer.dropout.p = 0.5
    x = torch.randn(2, 5, 8).repeat(3000, 1, 1)
    with keep_for_clip():
        joint = [*run_jointly(layers, x)]
    assert (joint[0] - joint[1])[:2].abs().max() > 0.1
    alone, *found = (drawn.unflatten(0, (3000, 2)).mean(dim=0) for drawn in (layers[0](x), *joint))
    for mean in found:
        torch.testing.assert_close(mean, alone, rtol=0, atol=0.15)


# Of videos

NUM_FRAMES = 6


@pytest.fixture(scope="module")
def tracked_model():
    """Domains with one expert and with several, in the memory attention and in the mask decoder."""
    model = new_model()
    add_learned_domain(model, "one", 1, num_experts=1, num_experts_per_tok=1, lora_rank=2)
    add_learned_domain(model, "several", 2, num_experts=3, num_experts_per_tok=2, lora_rank=2)
    heads = {"expert_modules": "output_hypernetworks_mlps.*.proj_*"}
    add_learned_domain(model, "heads", 3, num_experts=1, num_experts_per_tok=1, **heads)
    for _, experts in expert_modules(model):
        nn.init.normal_(experts.lora_B)
    return model


def start(model, domain):
    processor = build_processor(model.config)
    frames = np.random.default_rng(0).integers(0, 255, (NUM_FRAMES, 90, 160, 3), dtype=np.uint8)
    session = processor.init_video_session(video=frames)
    prompts = {"input_boxes": [[[20, 20, 90, 70], [60, 10, 120, 80]]]}
    processor.add_inputs_to_inference_session(session, 0, [1, 2], **prompts)
    session.domain = domain
    return session


def propagate(model, session):
    return model.propagate_in_video_iterator(session, 0)


def one_by_one(model, session):
    """Calls keep nothing for each other."""
    for frame_idx in range(NUM_FRAMES):
        yield model(session, frame_idx=frame_idx)


def masks(outputs):
    return torch.stack([output.pred_masks for output in outputs])


@pytest.mark.parametrize("domain", [None, "one", "several", "heads"])
def test_a_propagated_video_has_the_masks_of_frames_one_by_one(tracked_model, domain):
    found, expected = (masks(run(tracked_model, start(tracked_model, domain))) for run in (propagate, one_by_one))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if domain is not None:
        assert (expected - masks(one_by_one(tracked_model, start(tracked_model, None)))).abs().max() > 0.05


def test_what_depends_on_no_memory_is_computed_once_for_frames_that_are_encoded_together(tracked_model):
    rows = []
    norm = tracked_model.memory_attention.layers[0].layer_norm1
    watch = norm.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    masks(propagate(tracked_model, start(tracked_model, "several")))
    watch.remove()
    assert rows == [4, 1]


@torch.inference_mode(False)
@torch.no_grad()
def change_weights(model, session):
    for part in (model.memory_attention, model.mask_decoder.output_hypernetworks_mlps):
        for parameter in part.parameters():
            parameter.mul_(1.2)


def change_settings(model, session):
    for _, experts in expert_modules(model):
        experts.scaling *= 4


def load_weights(model, session):
    state = {name: x * 1.2 for name, x in model.state_dict().items() if name.startswith("memory_attention.")}
    assert not model.load_state_dict(state, strict=False).unexpected_keys


def change_times(model, session):
    state = {
        "memory_temporal_positional_encoding": model.memory_temporal_positional_encoding + torch.linspace(-5, 5, 64)
    }
    model.load_state_dict(state, strict=False)


def choose_another(model, session):
    session.domain = "several"


def remove(model, session):
    session.domain = None
    remove_domain(model, "one")


def add(model, session):
    add_learned_domain(model, "third", 3, num_experts=1, num_experts_per_tok=1, lora_rank=4)
    session.domain = "third"


def adapt(model, session):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), "other")
    model.eval()


def convert(model, session):
    model.double()


EVENTS = (change_weights, change_settings, load_weights, change_times, choose_another, remove, add, adapt, convert)


@pytest.fixture(scope="module")
def unchanged(tracked_model):
    return masks(propagate(tracked_model, start(tracked_model, "one")))


@pytest.mark.parametrize("event", EVENTS)
def test_what_changes_while_a_video_is_propagated_counts_from_the_next_frame_on(tracked_model, unchanged, event):
    results = []
    for run in (propagate, one_by_one):
        model = copy.deepcopy(tracked_model)
        session = start(model, "one")
        outputs = run(model, session)
        early = [next(outputs) for _ in range(3)]
        with torch.inference_mode(False):
            event(model, session)
        early, late = masks(early), masks(outputs)
        assert late.dtype == model.dtype
        results.append((early, late))
    (early, late), (_, expected) = results
    # Memories are rounded to bfloat16: what differs in the last digit differs in single logits a few frames on.
    assert (late - expected).abs().mean() < 2e-5 and (late - expected).abs().max() < 5e-3
    torch.testing.assert_close(early, unchanged[:3])
    assert event is convert or (late - unchanged[3:]).abs().max() > 1e-2


def test_two_propagations_at_once_keep_apart(tracked_model):
    other = copy.deepcopy(tracked_model)
    change_weights(other, None)
    together = zip(
        propagate(tracked_model, start(tracked_model, "one")),
        propagate(other, start(other, "one")),
        propagate(tracked_model, start(tracked_model, "several")),
        strict=True,
    )
    for found, (model, domain) in zip(
        zip(*together, strict=True), ((tracked_model, "one"), (other, "one"), (tracked_model, "several")), strict=True
    ):
        expected = masks(one_by_one(model, start(model, domain)))
        torch.testing.assert_close(masks(found), expected, rtol=1e-4, atol=1e-4)


def test_routers_are_watched_while_a_video_is_propagated(tracked_model):
    outputs = propagate(tracked_model, start(tracked_model, "several"))
    next(outputs), next(outputs)
    with record_router_logits(tracked_model) as records:
        next(outputs)
    counts = {len(calls) for name, calls in records.items() if "several" in name}
    assert counts == {1}
    assert sum(len(calls) for _, calls in records.items()) == len([n for n in records if "several" in n])


def test_gradients_are_computed_after_a_propagation(tracked_model):
    model = copy.deepcopy(tracked_model)
    list(propagate(model, start(model, "one")))
    pixels, labels = torch.randn(1, 2, 3, 128, 128), torch.zeros(1, 1, 2, 128, 128, dtype=torch.bool)
    labels[..., 30:80, 30:80] = True
    model.train()(pixels, labels, domain="one").loss.backward()
    gradients = [x.lora_B.grad for name, x in expert_modules(model) if "one" in name]
    assert gradients and all(bool(x.any()) and bool(x.isfinite().all()) for x in gradients)
