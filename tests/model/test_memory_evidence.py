"""How well objects were seen on a frame, and whether something else was nearly taken for them."""

import pytest
import torch

from samoe_hf.model.memory_evidence import STEPS_PER_WAIT, judge


def logits(*boxes: tuple[int, int, int, int]) -> torch.Tensor:
    """Logits (32, 32), positive in boxes (x0, y0, x1, y1)."""
    mask = torch.full((32, 32), -5.0)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = 5.0
    return mask


def judged(candidates, iou_scores=(0.9, 0.5, 0.4), object_score=2.0, find_doubles=True):
    candidates = torch.stack(candidates)[None]
    scores = torch.tensor([iou_scores])
    return judge(candidates[:, :1], candidates, scores, torch.tensor([[object_score]]), find_doubles)[0]


OWN = (0, 0, 10, 10)


def test_the_score_is_that_of_being_there_times_the_expected_iou():
    evidence = judged([logits(OWN)] * 3)
    assert evidence.score == pytest.approx((2 * torch.tensor(2.0).sigmoid().item() - 1) * 0.9, abs=1e-6)
    assert evidence.iou == pytest.approx(0.9) and evidence.area == 100 and evidence.box_iou == 1
    assert judged([logits(OWN)] * 3, object_score=-0.1).score == 0


@pytest.mark.parametrize("steps", [1, 32])  # as on a CPU, and on a GPU
@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([(20, 0, 30, 10)], 100 / 300),  # a double: one box around both is three times as large
        ([OWN, (20, 0, 30, 10)], 100 / 300),
        ([(20, 0, 30, 10), (30, 30, 32, 32)], 100 / 300),  # of the rest only its largest region counts
        ([(2, 2, 8, 8)], 1.0),  # a part of the object
        ([(0, 0, 12, 10)], 100 / 120),  # a wider outline
        ([], 1.0),
    ],
)
def test_a_double_widens_the_box(other, expected, steps, monkeypatch):
    monkeypatch.setitem(STEPS_PER_WAIT, "cpu", steps)
    assert judged([logits(OWN), logits(*other), logits(OWN)]).box_iou == pytest.approx(expected)


def test_nothing_is_looked_for_where_nobody_asks_or_the_mask_is_poor():
    candidates = [logits(OWN), logits((20, 0, 30, 10)), logits(OWN)]
    assert judged(candidates, find_doubles=False).box_iou == 1
    assert judged(candidates, iou_scores=(0.7, 0.5, 0.4)).box_iou == 1
