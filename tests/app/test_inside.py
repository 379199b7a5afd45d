"""Comparisons, what the experts do on a frame, and pictures."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch

from helpers.app import maps_of, run_all, state_of
from helpers.edgetam import edgetam_model, needs_timm
from samoe_hf.analysis.routing import observe_routers, short_name
from samoe_hf.analysis.usage import RouterSums
from samoe_hf.app.comparison import Comparison, Side
from samoe_hf.app.experts_view import look_at_experts
from samoe_hf.app.models import BASE, GATE, LoadedModel
from samoe_hf.app.people import Person
from samoe_hf.app.pictures import draw_frame, jpeg_url, shown_size, to_video
from samoe_hf.inference import VideoPrompt
from samoe_hf.model.domain_experts import module_layer
from samoe_hf.model.domain_gate import NO_DOMAIN, GateDecision
from samoe_hf.model.processing_samoe import build_processor


@pytest.fixture
def prompted(make_session, two_domains):
    session = make_session(model=two_domains)
    session.use(two_domains, "second")
    session.click(session.add_object(), 1, 20, 30)
    session.click(session.add_object(), 1, 70, 30)
    return session


@pytest.fixture
def sides(two_domains):
    return Side("a", two_domains, "second"), Side("b", two_domains, None)


def test_two_sides_are_what_sessions_of_their_own_give(prompted, two_domains, sides, tmp_path):
    run_all(prompted.propagate())
    comparison = Comparison(prompted, sides, tmp_path)
    assert run_all(comparison.run()) == 16 and comparison.frames == list(range(8))
    a, b = (np.stack([store.read(t, [1, 2]) for t in range(8)]) for store in comparison.masks)
    # Objects that are prompted together run as one batch, which rounds otherwise.
    # The model was never trained, and enlarges that.
    rounding = (a != maps_of(prompted)).mean()
    assert rounding < 0.02 and (a != b).mean() > 2 * rounding + 1e-3
    assert comparison.picture(3).shape[1] == 2 * shown_size((64, 96))[1] + 8
    for row, object_id in zip(comparison.table(), (1, 2), strict=True):
        x, y = a == object_id, b == object_id
        unions = (x | y).sum((1, 2))
        iou = [(x & y)[t].sum() / unions[t] for t in range(8) if unions[t]]
        assert row[:2] == [f"object {object_id}", f"{np.mean(iou):.2f}"] and float(row[2]) > 0.9
    assert comparison.headers() == ["mean IoU", "a and b", "a and your masks", "b and your masks"]
    prompted.use(two_domains, None)
    run_all(prompted.propagate())
    assert (b != maps_of(prompted)).mean() < 0.02


def test_a_comparison_needs_prompts_leaves_corrections_out_and_is_stopped(prompted, session, sides, tmp_path):
    run_all(prompted.propagate())
    prompted.end_object(1, 6)
    same = Comparison(prompted, (sides[0], sides[0]), tmp_path)
    run_all(same.run())
    assert float(same.table()[0][2]) > 0.8  # frames from 6 on, on which it was tracked before, do not count
    prompted.click(1, 4, 40, 40)
    comparison = Comparison(prompted, sides, tmp_path)
    assert len(comparison.prompts) == 4
    assert {one.frame_idx for one in Comparison(prompted, sides, tmp_path, True).prompts} == {1, 6}
    steps = comparison.run()
    next(steps)
    comparison.stop()
    assert next(steps, None) is None and comparison.frames == [] and comparison.table()[0][1] == "–"
    with pytest.raises(ValueError, match="Nothing is prompted"):
        Comparison(session, sides, tmp_path)


def test_what_is_tracked_ends_without_an_error_where_another_video_is_opened(prompted, sides, tmp_path):
    pytest.importorskip("gradio", reason="needs the `app` extra")
    from samoe_hf.app.look_page import SideBySide
    from samoe_hf.app.track_page import TrackPart

    part, comparison = Mock(progress="progress"), Comparison(prompted, sides, tmp_path)
    for begin in (lambda who: TrackPart.run(part, "whole", who, 0), lambda who: SideBySide.run(part, who, comparison)):
        person = Person("secret", tmp_path, session=prompted)
        steps = begin(person)
        next(steps)
        person.take(None)
        (shown,) = steps
        assert shown["progress"] in ("", "Stopped before both had tracked a frame.")


def test_both_sides_read_memories_as_the_session_does(session, sides, tmp_path, monkeypatch):
    session.click(session.add_object(), 1, 40, 40)
    session.use(session.loaded, memory_selection="score")
    seen = []
    track = lambda *_, memory_selection, **others: seen.append(memory_selection) or iter(())  # noqa: E731
    monkeypatch.setattr("samoe_hf.app.comparison.track_video", track)
    run_all(Comparison(session, sides, tmp_path).run())
    assert seen == ["score", "score"]


def test_experts_are_seen_and_the_session_stays_as_it_is(prompted, make_session, two_domains):
    with pytest.raises(ValueError, match="Go to a frame that was tracked"):
        look_at_experts(prompted, 1)
    other = make_session(model=two_domains)
    other.use(two_domains, "second")
    for x in (20, 70):
        other.click(other.add_object(), 1, x, 30)
    for one in (prompted, other):
        for _ in zip(range(3), one.propagate(), strict=False):
            pass
    view = look_at_experts(prompted, 3)
    layer, seen = next(iter(view.layers.items()))
    assert view.frame == 3 and seen.num_experts == 2 and set(seen.maps) == {1, 2} == set(seen.gates)
    assert all(abs(gates.sum() - 1) < 1e-5 for gates in seen.gates.values())
    # One expert of two has a token, so the share of the map is the mean weight.
    assert np.isclose((seen.maps[1] == 0).mean(), seen.gates[1][0])
    assert view.draw_map(prompted, layer, 1).shape[2] == 3 and view.draw_usage(layer).axes
    for one in (prompted, other):
        run_all(one.propagate("forward", 3))
    assert state_of(prompted) == state_of(other)


def test_experts_of_a_late_object_are_those_that_tracked_it_back(make_session, two_domains):
    session, gates = make_session(model=two_domains), {}
    session.use(two_domains, "second")
    session.click(session.add_object(), 5, 20, 30)
    session.click(session.add_object(), 1, 70, 30)

    def keep(name, rows, logits):
        for row, sums in zip(rows, RouterSums.from_logits(logits, 1), strict=True):
            gates[name, row.frame_idx, row.object_id] = sums.mean_gates

    with observe_routers(two_domains.model, keep):
        run_all(session.propagate())
    views = look_at_experts(session, 3).layers
    assert {i for view in views.values() for i in view.gates} >= {1, 2}
    seen = {name: view.gates[1] for name, view in views.items() if 1 in view.gates}
    tracked = {short_name(module_layer(name)): gate for (name, t, i), gate in gates.items() if (t, i) == (3, 1)}
    assert seen.keys() == tracked.keys() and all(np.allclose(seen[name], tracked[name]) for name in seen)


@needs_timm
def test_experts_of_a_layer_that_runs_twice_are_those_of_all_tokens(make_session):
    """EdgeTAM's perceiver makes latents of a map, and then of windows."""
    model = edgetam_model(with_experts=True, expert_modules="spatial_perceiver.*.[qv]_proj", num_experts_per_tok=1)
    loaded, sums = LoadedModel("edgetam", "", model, build_processor(model.config)), {}
    session = make_session(model=loaded)
    session.click(session.add_object(), 1, 20, 30)
    run_all(session.propagate())

    def keep(name, rows, logits):
        if rows[0].frame_idx == 3:
            sums.setdefault(name, []).extend(RouterSums.from_logits(logits, 1))

    with observe_routers(model, keep):
        session.use(loaded)
        run_all(session.propagate())
    views = look_at_experts(session, 3).layers
    assert views.keys() == sums.keys() and len(views) == 8
    for name, (of_map, of_windows) in sums.items():
        both = of_map + of_windows
        assert views[name].sums[1].tokens == both.tokens
        np.testing.assert_allclose(views[name].gates[1], both.mean_gates, atol=0.05)  # rounding may tip a choice


def test_the_page_says_whose_experts_a_video_of_no_known_domain_gets(make_session, two_domains, monkeypatch):
    pytest.importorskip("gradio", reason="needs the `app` extra")
    from samoe_hf.app.track_page import how_tracked

    stranger = GateDecision(
        torch.tensor([NO_DOMAIN]), torch.tensor([0.9]), torch.ones(1, 2), torch.tensor([[0.01, 0.99]])
    )
    monkeypatch.setattr(two_domains.model.domain_gate, "decide", lambda _: stranger)
    for unknown, said in (
        ("base", "Experts: **the base model, no domain's experts**, chosen by the gate, 90% sure."),
        ("mix", "Experts: **second**, half of what they add, as the nearest: the gate knows no such video."),
    ):
        monkeypatch.setattr(two_domains.model.config, "unknown", unknown)
        session = make_session(model=two_domains)
        session.masks.write(0, np.ones(session.masks.size, np.uint8))  # as an opened project has it
        assert how_tracked(session).endswith("The gate decides at the next click or tracked frame whose experts run.")
        session.click(session.add_object(), 0, 20, 30)
        assert how_tracked(session).endswith(said)
    session.use(two_domains, "second")
    assert how_tracked(session).endswith("Experts: **second**, as you chose.")


def test_names_of_domains(small_model, two_domains):
    assert small_model.domain_choices == {}
    assert two_domains.domain_choices == {GATE: "auto", BASE: None, "first": "first", "second": "second"}


@pytest.mark.parametrize("size", [(64, 96), (1080, 1920), (3000, 20), (20, 3000)])
def test_clicks_on_the_shown_picture_hit_the_video(size):
    height, width = shown_size(size)
    assert height <= 720 and width <= 1280
    x, y = to_video(width - 1, height - 1, size)
    assert size[1] - size[1] / width < x < size[1] and size[0] - size[0] / height < y < size[0]
    assert to_video(0, 0, size)[0] == 0.5 * size[1] / width


def test_objects_and_prompts_are_drawn():
    frame, ids = np.full((100, 100, 3), 128, np.uint8), np.zeros((100, 100), np.uint8)
    empty = draw_frame(frame, ids)
    assert empty.shape == (384, 384, 3) and (empty == 128).all()
    ids[20:60, 20:60] = 1
    prompts = [VideoPrompt(1, 0, [(80, 80)], [0], (10, 10, 70, 70))]
    drawn = draw_frame(frame, ids, prompts, corner=(90.0, 10.0))
    for y, x in ((40, 40), (10, 40), (80, 80), (10, 90)):
        around = drawn[int(y * 3.84) - 8 : int(y * 3.84) + 8, int(x * 3.84) - 8 : int(x * 3.84) + 8]
        assert (around != 128).any()
    assert jpeg_url(drawn).startswith("data:image/jpeg;base64,")
