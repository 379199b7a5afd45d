"""Trains on a stream of items, and writes which clips this process saw, and how many objects each has.

torchrun stream_clips.py MODEL OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path

from torch.utils.data import IterableDataset
from transformers import AutoProcessor

from samoe_hf import SamoeModel, SamoeTrainer
from samoe_hf.data import SyntheticVideos
from samoe_hf.model.prompt_recipe import PROMPT_RECIPES
from samoe_hf.training.arguments import SamoeTrainingArguments


class Stream(IterableDataset):
    def __iter__(self):
        for index, video in enumerate(SyntheticVideos(4, 3, (64, 64))):
            masks = [video.masks(t) for t in range(3)]
            yield {"frames": list(video.frames), "masks": masks, "video_id": str(index)}


folder, output = sys.argv[1:]
arguments = SamoeTrainingArguments(
    output, max_steps=2, per_device_train_batch_size=1, report_to="none", disable_tqdm=True, save_strategy="no",
    use_cpu=True, ddp_backend="gloo",
)  # fmt: skip
trainer = SamoeTrainer(
    SamoeModel.from_pretrained(folder), arguments, PROMPT_RECIPES["mask"],
    processing_class=AutoProcessor.from_pretrained(folder), train_dataset=Stream(),
)  # fmt: skip
collate, seen = trainer.data_collator, []


def record(clips):
    seen.extend((clip["video_id"], len(clip["labels"])) for clip in clips)
    return collate(clips)


trainer.data_collator = record
trainer.train()
Path(output, str(arguments.process_index)).write_text(json.dumps(seen))
