"""Simulated prompts have the distribution that SAM 2's training describes."""

from collections import Counter

import pytest
import torch

from samoe_hf.model.prompt_recipe import (
    PROMPT_RECIPES,
    PromptRecipe,
    bounding_boxes,
    sample_box,
    sample_point_from_errors,
    sample_prompt,
)

DRAWS = 4000


def share(count: int, expected: float, draws: int = DRAWS) -> None:
    """Asserts that `count` of `draws` is within four standard deviations of what is expected."""
    deviation = (expected * (1 - expected) / draws) ** 0.5
    assert abs(count / draws - expected) <= 4 * deviation + 1e-9, (count / draws, expected)


def test_plans_have_the_probabilities_of_the_recipe():
    torch.manual_seed(0)
    plans = [PromptRecipe().draw(8) for _ in range(DRAWS)]
    assert all(0 in plan.kinds for plan in plans)
    share(sum("mask" in plan.kinds.values() for plan in plans), 0.5)
    assert all(set(plan.kinds.values()) == {"mask"} for plan in plans if "mask" in plan.kinds.values())
    share(sum(len(plan.kinds) == 2 for plan in plans), 0.5)
    with_points = [plan for plan in plans if "mask" not in plan.kinds.values()]
    share(sum(plan.kinds[0] == "box" for plan in with_points), 0.5, len(with_points))
    assert all(plan.corrected == () for plan in plans if "mask" in plan.kinds.values())
    # Corrected are the initial frames, and of one initial frame every other time one more.
    assert all(set(plan.kinds) <= set(plan.corrected) for plan in with_points)
    single = [plan for plan in with_points if len(plan.kinds) == 1]
    share(sum(len(plan.corrected) == 2 for plan in single), 0.5, len(single))
    assert all(len(plan.corrected) == 2 for plan in with_points if len(plan.kinds) == 2)
    others = Counter(t for plan in plans for t in plan.kinds if t > 0)
    for t in range(1, 8):
        share(others[t], 1 / 7, sum(others.values()))


def test_short_clips_and_named_recipes():
    torch.manual_seed(0)
    for _ in range(50):
        plan = PromptRecipe().draw(1)
        assert list(plan.kinds) == [0] and plan.kinds[0] in ("point", "box") and plan.corrected == (0,)
        # One of two frames is left without a prompt, or memory would be read on none.
        assert len(PromptRecipe(max_initial_frames=2).draw(2).kinds) == 1
        for kind in ("mask", "point", "box"):
            plan = PROMPT_RECIPES[kind].draw(5)
            assert plan.kinds == {0: kind} and plan.corrected == ()
    assert PROMPT_RECIPES["mask"].draw(1).kinds == {0: "mask"}


def test_clicks_are_uniform_over_the_errors_and_labelled_by_their_kind():
    torch.manual_seed(0)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    prediction = mask.clone()
    mask[0, :4, :4] = True  # 16 pixels, of which 8 are found
    prediction[0, 2:6, :4] = True  # 8 of them wrong
    points, labels = sample_point_from_errors(mask.expand(DRAWS, 8, 8), prediction.expand(DRAWS, 8, 8))
    x, y = points[:, 0].long().unbind(1)
    assert (mask ^ prediction)[0, y, x].all()
    torch.testing.assert_close(labels[:, 0].bool(), mask[0, y, x])
    share(int(labels.sum()), 0.5)
    cells = Counter(zip(x.tolist(), y.tolist(), strict=True))
    assert len(cells) == 16
    for count in cells.values():
        share(count, 1 / 16)


def test_clicks_where_nothing_is_wrong_or_nothing_is_there():
    mask = torch.zeros(2, 6, 6, dtype=torch.bool)
    mask[0, 1:3, 1:3] = True
    points, labels = sample_point_from_errors(mask, mask)
    x, y = points[:, 0].long().unbind(1)
    assert not mask[torch.arange(2), y, x].any() and (labels == 0).all()
    _, labels = sample_point_from_errors(mask)
    assert labels[0, 0] == 1 and labels[1, 0] == 0
    _, labels = sample_point_from_errors(torch.ones(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool))
    assert labels.item() == 0


def test_boxes_are_bounding_boxes_with_bounded_noise():
    torch.manual_seed(0)
    mask = torch.zeros(1, 125, 600, dtype=torch.bool)
    mask[0, 12:113, 50:551] = True  # 100 high, 500 wide between the outermost pixels
    torch.testing.assert_close(bounding_boxes(mask), torch.tensor([[50.0, 12, 550, 112]]))
    corners, labels = sample_box(mask.expand(DRAWS, 125, 600))
    assert labels.tolist()[0] == [2, 3]
    shift = corners.flatten(1) - torch.tensor([50.0, 12, 550, 112])
    # A tenth of the side, at most 20 pixels: 20 of the width, 10 of the height.
    limit = torch.tensor([20.0, 10, 20, 10])
    assert (shift.abs() <= limit + 1e-4).all() and (shift.abs().amax(dim=0) > 0.95 * limit).all()
    torch.testing.assert_close(shift.std(dim=0), limit / 3**0.5, rtol=0.05, atol=0)
    assert sample_box(torch.ones(1, 30, 30, dtype=torch.bool))[0].max() <= 29
    assert bounding_boxes(torch.zeros(1, 5, 5, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]


@torch.no_grad()
def test_corrections_follow_the_errors_one_after_the_other_and_each_counts(nano, clip, monkeypatch):
    """Each click sees the prediction that the one before it led to, and refines its mask; its loss is added."""
    seen = []

    def spy(masks, predictions=None):
        seen.append(predictions)
        return sample_point_from_errors(masks, predictions)

    monkeypatch.setattr("samoe_hf.model.prompt_recipe.sample_point_from_errors", spy)

    def loss(clicks, from_mask):
        seen.clear()
        torch.manual_seed(0)
        recipe = PromptRecipe(1.0, 1.0, 1, 1, clicks, click_from_mask_probability=from_mask)
        return nano.model(*clip, prompts=recipe).loss_dict["object_score"].item()

    without = loss(0, 0.0)
    assert loss(3, 0.0) > 1.5 * without
    assert len(seen) == 3 and all(predictions.shape == (2, 128, 128) for predictions in seen)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert loss(3, 1.0) > 0 and seen == [None] * 3


def test_prompts_lie_where_their_objects_are_seen():
    shown = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    for _ in range(DRAWS):
        plan = PromptRecipe(max_initial_frames=3, max_corrected_frames=6).draw(6, shown)
        assert {*plan.kinds, *plan.corrected} <= {0, 3, 5} and min(plan.kinds) == 0
    late = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]]).bool()
    assert all(min(PromptRecipe().draw(4, late).kinds) == 2 for _ in range(DRAWS))
    apart = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    assert {0, 2} <= PROMPT_RECIPES["mixed"].draw(4, apart).kinds.keys()
    kinds = [PromptRecipe(prompt_absent_objects=True).draw(6, shown).kinds for _ in range(DRAWS)]
    assert any({1, 2, 4} & one.keys() for one in kinds) and all(0 in one for one in kinds)


@pytest.mark.parametrize("kind", ["box", "point"])
def test_an_object_that_is_not_seen_gets_no_points(kind):
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[1, 4:9, 5:12] = True
    prompt, old = sample_prompt(masks, kind), sample_prompt(masks, kind, of_absent_objects=True)
    assert (prompt.labels[0] == -1).all() and (old.labels[0] >= 0).all()
    assert (prompt.labels[1] > 0).all() and not (prompt.points[0] == 0).any()
    _, labels = PromptRecipe().corrections(masks).draw(torch.ones_like(masks))
    assert labels[:, 0].tolist()[0] == -1 and labels[1] == 0
