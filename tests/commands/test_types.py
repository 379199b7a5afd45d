"""`--dtype`, `--compile` and `--image-size` of the commands that run a model."""

import json

import numpy as np
import pytest
import torch

from samoe_hf import SamoeModel, VideoSession, small_base
from samoe_hf.data import SyntheticVideos, read_label_png, write_video
from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt, load_tracker, track_video
from samoe_hf.tracks import read_tracks

DATA = ["--dataset", "synthetic", "--option", "num_videos=1", "--option", "num_frames=3"]
DATA += ["--option", "image_size=[96, 96]"]
HALF = ["--dtype", "bfloat16"]


@pytest.fixture
def compiled(monkeypatch):
    """Models are not compiled, but listed."""
    models = []
    monkeypatch.setattr(SamoeModel, "compile_for_tracking", lambda model: models.append(model))
    return models


@pytest.fixture
def words(model_folder, leave_out_pictures, tmp_path):
    """A command with what it needs; it writes into the folder `out`."""
    leave_out_pictures()
    write_video(tmp_path / "in.mp4", SyntheticVideos(1, 4, (96, 128), seed=3)[0].frames, fps=5)
    prompts = ["--box", "10,10,60,60", "--box", "2=30,30,90,80", "--output", tmp_path / "out.mp4"]

    def of(command: str) -> list:
        rest = [tmp_path / "in.mp4", *prompts] if command == "track" else [*DATA, "--output", tmp_path / "out"]
        return [command, model_folder, *rest]

    return of


def check_files(folder):
    for table in folder.rglob("*tracks*.csv"):
        rows = read_tracks(table)
        assert rows and all(0 <= value <= 1 for row in rows for value in (row.score, row.iou, row.stability))
    assert any(read_label_png(file).any() for file in folder.rglob("*.png") if "mask" in str(file.parent))


@pytest.mark.parametrize("command", ["track", "label", "evaluate"])
def test_commands_compute_in_half_precision_and_at_another_size(samoe, words, compiled, tmp_path, command):
    samoe(*words(command), *HALF, "--compile", "--memory-selection", "distractor", "--image-size", "64")
    assert [(model.dtype, model.config.image_size) for model in compiled] == [(torch.bfloat16, 64)]
    check_files(tmp_path)
    sizes = {read_label_png(file).shape for file in tmp_path.rglob("*masks/**/*.png")}
    assert sizes == {(96, 128) if command == "track" else (96, 96)}, "masks are as large as the video"


def test_what_was_tracked_in_half_precision_is_nearly_what_it_is_in_float32(samoe, words, tmp_path):
    maps = []
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"Computed in {dtype}." in samoe(*words("track"), "--dtype", dtype, "--overwrite")
        maps.append(np.stack([read_label_png(file) for file in sorted((tmp_path / "out_masks").iterdir())]))
    assert all((one == maps[0]).mean() > 0.95 for one in maps)


@pytest.mark.parametrize("command", ["label", "evaluate"])
def test_a_folder_of_another_type_selection_or_size_is_refused_by_the_option_and_compiled_or_not_is_the_same(
    samoe, words, compiled, command
):
    samoe(*words(command), "--dtype", "auto")
    samoe(*words(command), "--dtype", "float32", "--compile")
    for option, value, differs in (
        ("--dtype", "bfloat16", "'float32', not 'bfloat16'"),
        ("--memory-selection", "distractor", "'recent', not 'distractor'"),
        ("--image-size", "96", "128, not 96"),
        ("--unknown", "mix", "'base', not 'mix'"),
    ):
        said = samoe(*words(command), option, value, fails=True)
        assert f"holds the results of another run: `{option}` is {differs}" in said and "config." not in said


def test_auto_is_float32_on_a_cpu_and_a_conversion_keeps_the_type(samoe, model_folder, tmp_path):
    SamoeModel.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_tracker(tmp_path / "half", "cpu")[0].dtype == torch.float32
    samoe("convert", tmp_path / "half", "--output", tmp_path / "out")
    assert SamoeModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_session_needs_not_be_told_the_type(model_folder):
    model, processor = load_tracker(model_folder, "cpu", "bfloat16")
    frames, masks = SyntheticVideos(1, 3, (96, 128), seed=3)[0].frames, []
    for told in ({}, {"dtype": torch.bfloat16}):
        session = VideoSession(frames, processor, **told)
        VideoPrompt(1, box=(10, 10, 60, 60)).add_to(session, processor)
        masks.append(torch.stack([one.pred_masks for one in model.propagate_in_video_iterator(session)]))
    assert torch.equal(*masks)


def test_masks_that_are_no_numbers_are_refused(model_folder):
    model, processor = load_tracker(model_folder, "cpu", torch.float16)
    with torch.no_grad():
        model.mask_decoder.upscale_conv2.bias.fill_(torch.nan)
    frames = SyntheticVideos(1, 3, (96, 128), seed=3)[0].frames
    with pytest.raises(InputError, match=r"predicts NaN on frame 0, in torch\.float16; .*the type too narrow"):
        list(track_video(model, processor, frames, [VideoPrompt(1, box=(10, 10, 60, 60))]))


def test_unknown_types_and_backends_are_named(model_folder):
    for dtype in ("float64", "half", torch.int8):
        with pytest.raises(InputError, match="`dtype` must be one of auto, float32, bfloat16, float16, got "):
            load_tracker(model_folder, "cpu", dtype)
    with pytest.raises(InputError, match=r"cannot compile for cpu here: .*nowhere"):
        SamoeModel.from_pretrained(model_folder).compile_for_tracking(backend="nowhere")


@pytest.mark.slow
def test_inductor_compiles_half_precision(samoe, words, tmp_path):
    maps, (command, _, *rest) = [], words("track")
    for option in ([], ["--compile"]):
        # A trained model: masks of random weights hang on how sums are rounded.
        samoe(command, small_base(), *rest, *HALF, *option, "--overwrite")
        maps.append(np.stack([read_label_png(file) for file in sorted((tmp_path / "out_masks").iterdir())]))
    assert maps[0].any() and (maps[0] == maps[1]).mean() > 0.95


def test_several_selections_are_compared_each_once(samoe, words, tmp_path):
    kinds = ["recent", "distractor", "recent"]
    samoe(*words("evaluate"), *[word for kind in kinds for word in ("--memory-selection", kind)])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [model["memory_selection"] for model in results["models"]] == ["recent", "distractor"]
    assert [model["label"].rpartition("-")[2] for model in results["models"]] == ["recent", "distractor"]


@pytest.mark.parametrize("command", ["experts", "convert", "app"])
def test_an_image_size_that_the_model_cannot_take_is_refused(words, samoe, model_folder, tmp_path, command):
    if command == "app":
        pytest.importorskip("gradio", reason="needs the `app` extra")
    rest = {"convert": ["convert", model_folder, "--output", tmp_path / "out"], "app": ["app", model_folder]}
    printed = samoe(*(rest[command] if command in rest else words(command)), "--image-size", "50", fails=True)
    assert "`image_size` must be a multiple of 32, got 50" in printed
