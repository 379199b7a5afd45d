"""Compiled models: few graphs whatever happens in a session, and the same masks."""

import copy

import pytest
import torch

from helpers.domains import add_learned_domain, with_two_domains
from helpers.edgetam import slow_over_bases
from samoe_hf.data import SyntheticVideos
from samoe_hf.model.graphs import uncompiled
from samoe_hf.model.memory_tokens import MemoryTokens, fill_up, full_length
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.video_session import VideoSession

POINT = {"input_points": [[[[40, 60]]]], "input_labels": [[[1]]]}
POINTS = {"input_points": [[[[60, 60], [10, 10]]]], "input_labels": [[[1, 0]]]}
BOX = {"input_boxes": [[[20, 20, 90, 70]]]}
MASK = {"input_masks": [torch.ones(128, 128, dtype=torch.bool).triu().numpy()]}


@pytest.fixture(autouse=True)
def graphs():
    """The counts of TorchDynamo."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters["stats"]


def run(model, num_frames, domain=None, **beside):
    """Masks of a session: one object, and those beside it, then two, corrections of both, then five, and back."""
    processor = build_processor(model.config)
    session = VideoSession(list(SyntheticVideos(1, num_frames, (128, 128), seed=3)[0].frames), processor)
    session.domain = domain
    masks = []

    def prompt(frame_idx, **prompts):
        for name, one in prompts.items():
            processor.add_inputs_to_inference_session(session, frame_idx, int(name[1:]), **one)
        masks.extend(model(session, frame_idx=frame_idx).pred_masks)

    def track(start, end):
        for output in model.propagate_in_video_iterator(session, start, end - start):
            masks.extend(output.pred_masks)

    half = num_frames // 2
    prompt(0, _1=POINT, **beside)
    track(0, half)
    prompt(half, _2=BOX)
    track(half, half + 3)
    prompt(half + 1, _1=POINTS)
    prompt(half + 2, _2=POINT)
    prompt(half + 3, _3=MASK, _4=BOX, _5=POINTS)
    track(half, num_frames - 1)
    return torch.stack(masks)


@slow_over_bases
@pytest.mark.parametrize(
    ("backend", "num_frames", "beside"),
    [("eager", 12, {"_6": BOX}), pytest.param("inductor", 100, {}, marks=pytest.mark.slow)],
)
def test_a_session_is_three_graphs(model, graphs, backend, num_frames, beside):
    """The image encoder, and all else for one object and for several, of which one takes seconds to be traced."""
    if backend == "eager":  # a second layer of a kind is traced as the first
        for part in (model.memory_attention, model.memory_encoder.memory_fuser, model.mask_decoder.transformer):
            part.layers = part.layers[:1]
    expected = run(model, num_frames, **beside)
    model.compile_for_tracking(backend=backend, fullgraph=True)
    before = graphs["unique_graphs"]
    found = run(model, num_frames, **beside)
    assert graphs["unique_graphs"] - before == (2 if beside else 3)
    assert torch.equal(found[0], expected[0]) or backend == "inductor"
    assert (found - expected).abs().mean() < 1e-5


@slow_over_bases
def test_what_fills_memories_up_is_not_read(nano):
    calls, model = [], nano.model
    watch = model.memory_attention.register_forward_pre_hook(lambda _, args: calls.append(args))
    run(model, 12)
    watch.remove()
    kinds = set()
    for *frame, memory, position, rotation, is_read in calls[::5]:
        tokens = MemoryTokens(memory, position, rotation, is_read)
        length = full_length(model, memory.shape[1])
        filled = fill_up(tokens, 3, length - memory.shape[1])
        assert filled.memory.shape[:2] == (len(memory) + 3, length)
        kinds.add(length)
        with torch.inference_mode():
            found, expected = (model.memory_attention(*frame, *x) for x in (filled, tokens))
        torch.testing.assert_close(found[: len(memory)], expected, atol=1e-5, rtol=1e-5)
    assert kinds == {len(model.base.memory_places(model, 1)) * 7 + 16 * 2}


@pytest.mark.slow
def test_each_domain_runs_its_own_experts(graphs):
    model = with_two_domains()
    expected = [run(model, 8, domain) for domain in ("a", "b", None)]
    assert (expected[0] - expected[1]).abs().mean() > 1e-3
    model.compile_for_tracking(backend="eager")
    for domain, wanted in zip(("a", "b", None), expected, strict=True):
        assert (run(model, 8, domain) - wanted).abs().mean() < 1e-5


@pytest.mark.slow
def test_graphs_are_recorded_for_few_sizes_and_what_they_put_out_is_copied(model):
    """A backend stands in for CUDA graphs: a graph puts its outputs where it put those of the same sizes before."""
    recorded = []

    def backend(graph, _, mode):
        places = {}

        def run_graph(*args):
            sizes = tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in args)
            outputs = graph(*args)
            if sizes not in places:
                recorded.append(sizes)
                places[sizes] = [x.clone() for x in outputs]
            for place, x in zip(places[sizes], outputs, strict=True):
                place.copy_(x)
            return places[sizes]

        return run_graph

    expected = run(model, 20)
    changed = copy.deepcopy(model)
    changed.compile_for_tracking(backend=backend, mode="reduce-overhead")
    recorded.clear()
    assert (run(changed, 20) - expected).abs().mean() < 1e-5
    assert len(recorded) == 5  # the image encoder; 1, 2, 4 and 8 objects
    run(changed, 20)
    assert len(recorded) == 5


@pytest.mark.slow
def test_domains_of_equal_settings_share_their_graphs(graphs, tmp_path):
    """More of them than TorchDynamo compiles versions of a graph."""
    model, names = with_two_domains(), [f"domain_{index}" for index in range(10)]
    for seed, name in enumerate(names):
        add_learned_domain(model, name, seed, num_experts=3, num_experts_per_tok=1, lora_rank=2)
    expected = {name: run(model, 8, name) for name in names}
    model.save_pretrained(tmp_path)
    for compiled in (model, type(model).from_pretrained(tmp_path)):
        torch._dynamo.reset()
        graphs.clear()
        compiled.compile_for_tracking(backend="eager", fullgraph=True)
        before = graphs["unique_graphs"]
        for name in names:
            assert (run(compiled, 8, name) - expected[name]).abs().mean() < 1e-5
        assert graphs["unique_graphs"] - before == 3


def test_what_ran_uncompiled_in_two_threads_at_once_is_compiled_again():
    graphs, (first, second) = [], (uncompiled(), uncompiled())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    torch.compile(torch.neg, backend=lambda graph, _: graphs.append(graph) or graph)(torch.ones(2))
    assert graphs
