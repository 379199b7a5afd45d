"""Which memories a frame reads: SAM 2's choice, SAM 3's and DAM4SAM's."""

import numpy as np
import pytest
import torch

from helpers.edgetam import edgetam_model, needs_timm
from helpers.sam3 import sam3_config
from samoe_hf import SamoeConfig, SamoeModel, VideoSession, small_base
from samoe_hf.data import SyntheticVideos
from samoe_hf.model.errors import InputError
from samoe_hf.model.memory_bank import Evidence, FrameMemory, MemoryBank
from samoe_hf.model.memory_selection import MemoryLimits, closest_frames, forget, remember, select_memories
from samoe_hf.model.processing_samoe import build_processor

SIDE = 128
LIMITS = MemoryLimits(num_maskmem=7, max_object_pointers=16)
SEEN = Evidence(score=0.9, iou=0.95, area=100)
DOUBLE, HIDDEN = SEEN._replace(box_iou=0.4), Evidence(score=0.0, iou=0.3, area=0)


def write(bank: MemoryBank, frame_idx: int, evidence: Evidence | None, conditioning=False, reverse=False) -> None:
    memory = FrameMemory(torch.zeros(1, 4), torch.zeros(1, 2, 3), None if evidence is None else [evidence])
    remember(bank, frame_idx, memory.row(0), conditioning, reverse)


def bank(
    conditioning=(), tracked=(), evidence: Evidence | None = None, reverse=False, **others: Evidence
) -> MemoryBank:
    """Memories of frames; `t5=...` is the evidence of frame 5."""
    bank = MemoryBank()
    for t in conditioning:
        write(bank, t, None, conditioning=True)
    for t in tracked:
        write(bank, t, others.get(f"t{t}", evidence), reverse=reverse)
    return bank


def frames(selection) -> tuple[list[int], list[int]]:
    return [t for t, _ in selection.spatial], [t for t, _ in selection.pointers]


def test_without_a_prompted_frame_there_is_nothing_to_track():
    with pytest.raises(InputError, match="Frame 3 cannot be tracked"):
        select_memories("recent", bank(tracked=[1, 2]), 3, LIMITS)


class TestRecent:
    def test_all_conditioning_frames_and_the_last_six_others(self):
        selection = select_memories("recent", bank([0], range(1, 20)), 20, LIMITS)
        assert selection.spatial == ((0, 6), (14, 5), (15, 4), (16, 3), (17, 2), (18, 1), (19, 0))
        assert selection.pointers == ((0, 20), *((20 - d, d) for d in range(1, 16)))
        assert selection.max_distance == 15

    def test_a_short_video_limits_pointers_and_their_scale(self):
        selection = select_memories("recent", bank([0], range(1, 5)), 5, LIMITS._replace(num_frames=6))
        assert selection.pointers == ((0, 5), (4, 1), (3, 2), (2, 3), (1, 4)) and selection.max_distance == 5

    def test_backward_in_time_mirrors_forward(self):
        forward = select_memories("recent", bank([0], range(1, 9)), 9, LIMITS)
        backward = select_memories("recent", bank([9], range(1, 9)), 0, LIMITS, reverse=True)
        assert [(9 - t, i) for t, i in backward.spatial] == list(forward.spatial)
        assert [(9 - t, d) for t, d in backward.pointers] == list(forward.pointers)

    def test_pointers_of_conditioning_frames_ahead_only_if_wanted(self):
        both = bank([0, 8])
        assert select_memories("recent", both, 4, LIMITS).pointers == ((0, 4),)
        ahead_too = select_memories("recent", both, 4, LIMITS._replace(past_pointers_only=False))
        assert ahead_too.pointers == ((0, 4), (8, -4)) and frames(ahead_too)[0] == [0, 8]

    def test_limited_conditioning_frames_are_the_closest_and_the_rest_may_be_recent(self):
        assert closest_frames(10, [0, 3, 8, 12, 20], 3) == [8, 12, 3]
        assert closest_frames(10, [0, 3], -1) == [0, 3]
        selection = select_memories("recent", bank([0, 7, 8, 9]), 10, LIMITS._replace(max_cond_frames=2))
        assert selection.spatial == ((9, 6), (8, 6), (7, 2))
        assert selection.pointers == ((9, 1), (8, 2), (7, 3), (0, 10))


class TestScore:
    def test_places_are_those_of_frames_that_scored_well(self):
        some = bank([0], range(1, 20), SEEN, **{f"t{t}": HIDDEN for t in range(9, 18)})
        selection = select_memories("score", some, 20, LIMITS)
        assert selection.spatial == ((0, 6), (5, 5), (6, 4), (7, 3), (8, 2), (18, 1), (19, 0))
        assert selection.pointers[:4] == ((0, 20), (19, 1), (18, 2), (8, 3))

    def test_the_previous_frame_is_always_read_and_the_farthest_has_no_pointer(self):
        some = bank([0], range(1, 5), SEEN, t4=HIDDEN)
        selection = select_memories("score", some, 5, LIMITS)
        assert selection.spatial == ((0, 6), (1, 3), (2, 2), (3, 1), (4, 0))
        assert selection.pointers == ((0, 5), (4, 1), (3, 2), (2, 3))

    def test_a_previous_frame_without_memory_keeps_its_place(self):
        selection = select_memories("score", bank([0], [1, 2], SEEN), 9, LIMITS)
        assert selection.spatial == ((0, 6), (1, 2), (2, 1))

    def test_frames_that_were_tracked_by_another_choice_are_read(self):
        assert frames(select_memories("score", bank([0], range(1, 9)), 9, LIMITS))[0] == [0, 3, 4, 5, 6, 7, 8]

    def test_backward_it_begins_at_the_end(self):
        some = bank([9], range(1, 9), SEEN, reverse=True)
        assert frames(select_memories("score", some, 0, LIMITS, reverse=True))[0] == [9, 6, 5, 4, 3, 2, 1]


class TestDistractor:
    def test_the_last_frame_on_which_it_is_seen_and_each_fifth_before(self):
        some = bank([0], range(1, 30), SEEN, t29=HIDDEN, t25=HIDDEN)
        selection = select_memories("distractor", some, 30, LIMITS)
        assert selection.spatial == ((0, 6), (5, 4), (10, 3), (15, 2), (20, 1), (28, 0))
        assert selection.pointers[:3] == ((0, 30), (28, 2), (27, 3)) and (25, 5) not in selection.pointers

    def test_frames_with_a_double_stay_as_conditioning_ones(self):
        some = bank([0], range(1, 60), SEEN, **{f"t{t}": DOUBLE for t in (11, 12, 18, 31, 47)})
        assert list(some.anchors) == [11, 18, 31, 47]
        conditioning = [t for t, index in select_memories("distractor", some, 60, LIMITS).spatial if index == 6]
        assert conditioning == [0, 47, 31, 18]

    def test_those_that_time_has_yet_to_pass_are_not_read(self):
        some = bank([0, 59], range(1, 59), SEEN, **{f"t{t}": DOUBLE for t in (11, 18, 31, 47)})
        for reverse, expected in ((False, [0, 59, 18, 11]), (True, [0, 59, 31, 47])):
            selection = select_memories("distractor", some, 20, LIMITS, reverse=reverse)
            assert [t for t, index in selection.spatial if index == 6] == expected

    @pytest.mark.parametrize("change", [{"iou": 0.8}, {"area": 60}, {"area": 130}, {"area": 0}, {"box_iou": 0.71}])
    def test_other_frames_do_not(self, change):
        assert not bank([0], range(1, 20), SEEN, t15=DOUBLE._replace(**change)).anchors

    def test_a_frame_that_is_tracked_anew_without_its_double_is_no_anchor_any_more(self):
        some = bank([0], range(1, 20), SEEN, t15=DOUBLE)
        write(some, 15, SEEN)
        assert not some.anchors


@pytest.mark.parametrize("kind", ["recent", "score", "distractor"])
def test_what_is_forgotten_is_read_by_no_later_frame(kind):
    hidden = {f"t{t}": HIDDEN for t in range(60, 200)} | {f"t{t}": DOUBLE for t in (20, 30, 45)}
    whole, lean = bank([0], [], SEEN), bank([0], [], SEEN)
    for t in range(1, 220):
        assert select_memories(kind, lean, t, LIMITS) == select_memories(kind, whole, t, LIMITS)
        for one in (whole, lean):
            write(one, t, hidden.get(f"t{t}", SEEN))
        forget(lean, kind, t, range(t - 32, t + 1), 32)
    assert len(lean.tracked) <= 3 * 33


@pytest.fixture(scope="module")
def clip():
    """Frames of the models' size and the first masks of three objects, one of which is not seen there."""
    video = SyntheticVideos(1, 8, (SIDE, SIDE), domain="scenes", seed=5)[0]
    first = torch.zeros(1, 3, 16, 16)
    first[0, 0, 3:6, 4:9] = first[0, 1, 9:14, 8:13] = 1
    return list(video.frames), torch.nn.functional.interpolate(first, (SIDE, SIDE))


BASES = pytest.mark.parametrize("base", ["sam2", pytest.param("edgetam", marks=needs_timm)])


def model_of(base, kind):
    if base == "edgetam":
        return edgetam_model(memory_selection=kind, with_experts=True)
    return SamoeModel.from_pretrained(small_base(), memory_selection=kind, image_size=SIDE).eval()


@BASES
@pytest.mark.parametrize("kind", [pytest.param("score", marks=pytest.mark.slow), "distractor"])
def test_clips_read_the_memories_that_sessions_read(clip, kind, base):
    """So that experts learn with the memories that they will have."""
    frames, first = clip
    model = model_of(base, kind).double()  # memories carry rounding on
    processor = build_processor(model.config)
    processed = processor.video_processor(videos=[np.stack(frames)], return_tensors="pt")
    pixel_values = processed.pixel_values_videos.double()
    with torch.no_grad():
        masks = model(pixel_values, input_masks=first).pred_masks[0]
        model.config.memory_selection = "recent"
        others = model(pixel_values, input_masks=first).pred_masks[0]
        model.config.memory_selection = kind
    session = VideoSession(frames, processor)
    processor.add_inputs_to_inference_session(session, 0, [1, 2, 3], input_masks=list(first[0].bool().numpy()))
    tracked = torch.stack([output.pred_masks[:, 0] for output in model.propagate_in_video_iterator(session)], dim=1)
    shown = first[0].flatten(1).any(dim=1)
    assert (tracked - masks)[shown].abs().flatten(1).mean(dim=1).max() < 1e-9
    assert (tracked[~shown, 1:] == -1024).all()  # nobody has shown it: a session asks the model about others alone
    assert (masks - others).abs().mean() > 5e-4


@BASES
@pytest.mark.parametrize("kind", ["score", pytest.param("distractor", marks=pytest.mark.slow)])
def test_experts_learn_with_them(clip, kind, base):
    _, first = clip
    model = model_of(base, kind).train()
    pixel_values = torch.randn(2, 5, 3, SIDE, SIDE)
    labels = first.bool().unsqueeze(2).expand(2, 3, 5, SIDE, SIDE)
    model.set_trainable("experts")
    model(pixel_values=pixel_values, labels=labels).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() and (g.any() or "lora_B" not in name) for name, g in gradients.items()) and gradients


def test_routers_are_counted_where_an_object_reads_something(clip):
    """Tokens that only fill a row up to the length of others are nobody's."""
    (frames, first), model = clip, model_of("sam2", "score")
    videos = build_processor(model.config).video_processor(videos=[np.stack(frames)], return_tensors="pt")
    layer = "memory_attention.layers.0.cross_attn_image.k_proj"

    def logits(first):
        with torch.no_grad():
            output = model(videos.pixel_values_videos, input_masks=first, output_router_logits=True)
        return output.router_logits[layer]

    together, alone = logits(first), [logits(first[:, row : row + 1]) for row in range(3)]
    assert len(together) == sum(map(len, alone)) < 3 * max(map(len, alone))
    torch.testing.assert_close(together.mean(dim=0), torch.cat(alone).mean(dim=0), rtol=1e-3, atol=1e-3)


def test_an_unknown_selection_is_refused_by_name():
    for choose in (
        lambda: VideoSession(memory_selection="best"),
        lambda: setattr(VideoSession(), "memory_selection", "best"),
    ):
        with pytest.raises(InputError, match="`memory_selection` must be one of 'recent', 'score', 'distractor' or"):
            choose()
    with pytest.raises(InputError, match="`memory_selection` must be one of recent, score, distractor, got 'best'"):
        SamoeConfig(memory_selection="best")


def test_the_default_is_the_bases_own():
    assert SamoeConfig().memory_selection == "recent"
    assert SamoeConfig.from_dict(sam3_config().to_dict()).memory_selection == "score"
