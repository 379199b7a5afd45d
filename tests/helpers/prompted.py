"""A video and prompts with which a model and its peer in transformers are tracked and compared."""

import numpy as np
import torch
from torch.nn import functional as F

HEIGHT, WIDTH, NUM_FRAMES = 60, 90, 8
MASK = np.pad(np.ones((30, 40), bool), ((10, 20), (20, 30)))
PROMPTS = {
    "point": {"input_points": [[[[20, 30]]]], "input_labels": [[[1]]]},
    "clicks": {"input_points": [[[[20, 30], [50, 20], [70, 40]]]], "input_labels": [[[1, 1, 0]]]},
    "box": {"input_boxes": [[[10, 10, 50, 40]]]},
    "box and click": {"input_boxes": [[[10, 10, 50, 40]]], "input_points": [[[[20, 30]]]], "input_labels": [[[1]]]},
    "objects": {"input_points": [[[[20, 30]], [[60, 30]], [[40, 50]]]], "input_labels": [[[1], [1], [1]]]},
    "mask": {"input_masks": [MASK]},
}


def frames(num_frames=NUM_FRAMES, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.random((num_frames, 6, 9, 3)).repeat(10, 1).repeat(10, 2)
    return [*(255 * (0.7 * coarse + 0.3 * rng.random((num_frames, HEIGHT, WIDTH, 3)))).astype(np.uint8)]


@torch.no_grad()
def track(model, processor, prompt, start=0, reverse=False, click=None, dtype=torch.float32):
    """Logits (frames + 1, objects, 1, H, W) in the order of tracking, the first frame twice; between them a `click`."""
    session = processor.init_video_session(video=frames(), dtype=dtype)
    num_objects = len(prompt["input_points"][0]) if "input_points" in prompt else 1
    processor.add_inputs_to_inference_session(session, start, [*range(1, num_objects + 1)], **prompt)
    outputs = [model(session, frame_idx=start).pred_masks]
    if click is not None:
        click = {"input_points": [[[click]]], "input_labels": [[[0]]], "clear_old_inputs": False}
        processor.add_inputs_to_inference_session(session, start, [1], **click)
        outputs.append(model(session, frame_idx=start).pred_masks)
    outputs += [x.pred_masks for x in model.propagate_in_video_iterator(session, start, reverse=reverse)]
    return torch.stack(outputs)


class OriginalsMasks:
    """Has a model of transformers take a mask prompt as the original does: the decoder gives the pointer as that of one
    mask, from a mask of the size of memories' masks; and the memory is made of the low-resolution logits."""

    def _use_mask_as_output(self, backbone_features, high_res_features, mask_inputs):
        output = super()._use_mask_as_output(backbone_features, high_res_features, mask_inputs)
        size = [4 * side for side in self.prompt_encoder.mask_input_size]
        resized = F.interpolate(mask_inputs, size, mode="bilinear", antialias=True)
        output.object_pointer = self._single_frame_forward(
            input_masks=self.mask_downsample(resized),
            image_embeddings=[*high_res_features, backbone_features],
            multimask_output=False,
        ).object_pointer
        output.high_res_masks = F.interpolate(output.pred_masks, (self.image_size,) * 2, mode="bilinear")
        return output
