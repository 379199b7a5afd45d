"""The model says what the rows of its batches are, where a module is watched."""

import torch

from samoe_hf.model.batch_rows import NO_ROWS, BatchRow, batch_rows


def test_rows_are_frames_in_the_encoder_and_objects_in_a_frame_step(nano, clip):
    model, seen = nano.model, {"encoder": [], "decoder": [], "pointer": []}
    places = {
        "encoder": model.vision_encoder.backbone.blocks[0],
        "decoder": model.mask_decoder.iou_prediction_head,
        "pointer": model.temporal_positional_encoding_projection_layer,
    }
    hooks = [
        module.register_forward_pre_hook(lambda _, args, place=place: seen[place].append((batch_rows(), len(args[0]))))
        for place, module in places.items()
    ]
    try:
        with torch.no_grad():
            model(*clip)
        expected = [BatchRow(0, t, i) for t in range(3) for i in range(2)]
        assert [row for rows, _ in seen["encoder"] for row in rows.rows] == [BatchRow(0, t) for t in range(3)]
        assert all(len(rows.rows) == size and not rows.shared for rows, size in seen["encoder"])
        assert {row for rows, _ in seen["decoder"] for row in rows.rows} <= set(expected)
        assert seen["decoder"] and all(len(rows.rows) == size == 2 for rows, size in seen["decoder"])
        assert seen["pointer"] and all(rows.shared and len(rows.rows) == 2 for rows, _ in seen["pointer"])
    finally:
        for hook in hooks:
            hook.remove()
    assert batch_rows() == NO_ROWS
