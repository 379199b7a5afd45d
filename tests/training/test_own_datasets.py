"""Datasets of one's own, of each form, through SamoeTrainer and plain Trainer."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoProcessor, Sam2VideoModel, TrainingArguments

from helpers.processes import run_two
from helpers.reference import assert_same_tensors
from samoe_hf import SamoeModel
from samoe_hf.data import ClipDataset, ClipStream, SyntheticVideos
from samoe_hf.model.prompt_recipe import PROMPT_RECIPES
from samoe_hf.training.arguments import SamoeTrainingArguments
from samoe_hf.training.trainer import SamoeTrainer

VIDEOS = SyntheticVideos(2, 4, (48, 64))


def frames_of(video):
    return np.stack(list(video.frames))


def masks_of(video):
    return np.stack([video.masks(t) for t in range(len(video))])


def ids_of(video):
    return np.stack([video.id_map(t) for t in range(len(video))]).astype(np.uint8)


class FloatsAndMasks(Dataset):
    def __len__(self):
        return len(VIDEOS)

    def __getitem__(self, index):
        video = VIDEOS[index]
        frames = torch.from_numpy(frames_of(video)).permute(0, 3, 1, 2) / 255
        return {"frames": frames, "masks": torch.from_numpy(masks_of(video)).float()}


class ArraysAndIds(Dataset):
    def __len__(self):
        return len(VIDEOS)

    def __getitem__(self, index):
        return {"frames": frames_of(VIDEOS[index]), "masks": ids_of(VIDEOS[index]), "domain": "lab"}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ArraysAndIds()[i] for i in range(len(VIDEOS)))


def image_lists():
    def images(arrays):
        return [Image.fromarray(array) for array in arrays]

    rows = {"frames": [images(frames_of(v)) for v in VIDEOS], "masks": [images(ids_of(v)) for v in VIDEOS]}
    images_feature = datasets.List(datasets.Image())
    return datasets.Dataset.from_dict(
        rows, features=datasets.Features({"frames": images_feature, "masks": images_feature})
    )


def samoe_trainer(model_folder, folder, train_dataset, eval_dataset=None, kind=SamoeTrainer, **options):
    model, processor = SamoeModel.from_pretrained(model_folder), AutoProcessor.from_pretrained(model_folder)
    options = {"max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 1} | options
    arguments = SamoeTrainingArguments(
        folder, report_to="none", disable_tqdm=True, use_cpu=True, learning_rate=1e-3, **options
    )
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    return kind(model, arguments, PROMPT_RECIPES["mask"], processing_class=processor, **data)


@pytest.mark.parametrize("make", [FloatsAndMasks, Stream, lambda: image_lists().to_iterable_dataset()])
def test_samoe_trainer_draws_clips_itself(make, model_folder, tmp_path):
    trainer = samoe_trainer(model_folder, tmp_path, make(), seed=7)
    clips = trainer.train_dataset
    assert isinstance(clips, ClipDataset | ClipStream) and clips.seed == 7
    assert clips.sampler.processor is trainer.processor
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.train().training_loss > 0
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


class Recording(SamoeTrainer):
    """Keeps the frames of each batch that it trains on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(inputs["pixel_values"])
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_each_step_takes_as_many_clips_of_a_stream_and_a_resumed_run_goes_on_with_the_next(model_folder, tmp_path):
    """A step that begins at the end of the stream goes on at its start, where clips are other ones."""
    options = {"max_steps": 2, "gradient_accumulation_steps": 3, "save_strategy": "steps", "save_steps": 1}
    clips = ClipStream(Stream(), AutoProcessor.from_pretrained(model_folder), num_frames=2)
    whole, resumed = (samoe_trainer(model_folder, tmp_path, clips, kind=Recording, **options) for _ in range(2))
    whole.train()
    assert len(whole.seen) == 6 and len({frames.numpy().tobytes() for frames in whole.seen}) > 2
    shutil.rmtree(tmp_path / "checkpoint-2")
    resumed.train(resume_from_checkpoint="last")
    assert len(resumed.seen) == 3 and all(map(torch.equal, resumed.seen, whole.seen[3:]))
    assert_same_tensors(resumed.model, whole.model)


def test_it_is_used_as_transformers_trainer_or_says_why_not(model_folder, tmp_path):
    """Several datasets are evaluated one by one; what cannot be used is named."""
    parts = {"one": VIDEOS[:1], "two": FloatsAndMasks()}
    trainer = samoe_trainer(model_folder, tmp_path, FloatsAndMasks(), eval_dataset=parts)
    found = trainer.evaluate()
    for name, part in parts.items():
        assert found[f"eval_{name}_J&F"] == trainer.evaluate(part)["eval_J&F"] == trainer.evaluate(name)["eval_J&F"] > 0
    model, args = trainer.model, trainer.args
    for call, message in (
        (lambda: trainer.predict(VIDEOS), r"clips must have `pixel_values`; ClipDataset\(videos, processor\)"),
        (lambda: trainer.evaluate({"frames": 1}), "not dict; put one item into a list"),
        (lambda: trainer.evaluate("three"), r"`eval_dataset`: 'three' is not a name of the trainer's own \(one, two\)"),
        (lambda: SamoeTrainer(model_init=lambda: model, args=args), "`model` must be .* not NoneType; `model_init` is"),
        (lambda: SamoeTrainer(model, args, compute_metrics=dict), "`compute_metrics` is for transformers.Trainer"),
        (lambda: SamoeTrainer(model, args, "mask"), "`recipe` must be a PromptRecipe, not str"),
        (lambda: SamoeTrainer(model, args, processing_class="base"), "`processing_class` must be .* not str"),
        (SamoeTrainer(model, SamoeTrainingArguments(tmp_path, trainable=[])).create_optimizer, "`trainable` is"),
        (lambda: SamoeTrainingArguments(learning_rate="1e-4"), "`learning_rate` must be at least 0, got '1e-4'"),
        (lambda: SamoeTrainer(model, args, optimizer_cls_and_kwargs=(1, {})), "`optimizer_cls_and_kwargs` is for"),
        (lambda: SamoeTrainer(model, args, eval_dataset={"one": "davis"}), "a dataset must be .*, not str"),
        (lambda: SamoeTrainingArguments(label_smoothing_factor=0.1), "`label_smoothing_factor` must be 0, got 0.1"),
        (lambda: SamoeTrainingArguments(neftune_noise_alpha=5), "`neftune_noise_alpha` must be None, got 5"),
        (lambda: SamoeTrainingArguments(train_sampling_strategy="group_by_length"), "must be random or sequential"),
        (lambda: SamoeTrainer(model), "`args` must be SamoeTrainingArguments, not NoneType"),
        (lambda: SamoeTrainer(model, TrainingArguments()), "`args` must be SamoeTrainingArguments, not TrainingArg"),
        (lambda: SamoeTrainer("facebook/sam2", args), "`model` must be .* not str"),
        (lambda: SamoeTrainer(Sam2VideoModel(model.config), args), "must be a SamoeModel.* not Sam2VideoModel"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_every_form_of_a_video_gives_the_same_clips(model_folder, tmp_path):
    """The videos' own, drawn by hand, and those of items of each form."""
    own = ClipDataset(VIDEOS, AutoProcessor.from_pretrained(model_folder), seed=42)
    forms = (own, FloatsAndMasks(), ArraysAndIds(), image_lists())
    drawn = [samoe_trainer(model_folder, tmp_path, data).train_dataset[1] for data in forms]
    # Where objects overlap, ids tell less than masks.
    for one, other in (drawn[:2], drawn[2:]):
        assert all(torch.equal(one[name], other[name]) for name in ("pixel_values", "labels"))


def test_evaluation_tracks_items_as_it_tracks_their_videos(model_folder, tmp_path):
    with pytest.raises(ValueError, match="`eval_dataset` must be given"):
        samoe_trainer(model_folder, tmp_path, FloatsAndMasks()).evaluate()
    trainer = samoe_trainer(model_folder, tmp_path, FloatsAndMasks(), eval_dataset=FloatsAndMasks())
    expected = trainer.evaluate(list(VIDEOS))
    for data in (None, [FloatsAndMasks()[i] for i in range(2)]):
        assert trainer.evaluate(data)["eval_J&F"] == expected["eval_J&F"]
    streamed = trainer.evaluate(Stream())
    assert streamed["eval_J&F"] == trainer.evaluate(image_lists())["eval_J&F"] == streamed["eval_lab_J&F"]


@pytest.mark.parametrize(
    "data, message",
    [
        ([(1, 2)], "mappings with `frames` and `masks`, not tuple"),
        (iter([]), "must not be an iterator"),
        ([], "without videos"),
        ({"frames": 1}, "not dict"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({})), "must be one split, but this has 'train'; give"),
        (datasets.Dataset.from_dict({"picture": [1]}), r"It has: picture \(int64\)"),
    ],
)
def test_what_is_no_dataset_of_videos_is_refused(data, message, model_folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        samoe_trainer(model_folder, tmp_path, data)


def test_a_run_that_takes_no_step_is_an_error(model_folder, tmp_path):
    few = {"per_device_train_batch_size": 3, "dataloader_drop_last": True}
    for data, options in ((FloatsAndMasks(), few), (ClipStream([], AutoProcessor.from_pretrained(model_folder)), {})):
        with pytest.raises(ValueError, match="No step was taken: `train_dataset` has no clips, or too few for a batch"):
            samoe_trainer(model_folder, tmp_path, data, **options).train()


@pytest.mark.slow
def test_processes_share_out_a_stream_whose_clips_differ_in_objects(model_folder, tmp_path):
    run_two("stream_clips.py", model_folder, tmp_path)
    seen = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    # The first batches of both; a loader reads one ahead.
    assert [clip[0] for clips in seen for clip in clips[:2]] == ["0", "2", "1", "3"]
    assert len({count for clips in seen for _, count in clips}) > 1
