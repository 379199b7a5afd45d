"""What commands have in common: the dataset, the model and the device that their options name."""

import argparse
import re
import unicodedata
from dataclasses import replace

import pytest

from helpers.own_videos import save_videos
from helpers.reference import CHECKPOINT, CONFIG, EXPERTS
from samoe_hf.cli import main
from samoe_hf.commands import options
from samoe_hf.data import SyntheticVideos, write_video
from samoe_hf.errors import InputError


def chosen_videos(*given):
    parser = argparse.ArgumentParser()
    options.add_dataset_options(parser)
    parsed = parser.parse_args(["--dataset", *map(str, given)])
    return options.open_dataset(parsed).videos()


def test_the_command_line_names_videos_by_kind_or_by_a_run(tmp_path):
    given = ["--option", "num_videos=3", "--option", "image_size=[32, 48]", "--option", "num_frames=4"]
    videos = chosen_videos("synthetic", "--domain", "blobs", *given)
    assert len(videos) == 3 and videos[0].domain == "blobs" and videos[0].size == (32, 48)
    chosen = videos[1].video_id
    (one,) = chosen_videos("synthetic", "--domain", "blobs", *given, "--video", chosen)
    assert one.video_id == chosen
    run = tmp_path / "run.yaml"
    run.write_text("eval_data:\n  - {kind: synthetic, domain: blobs, num_videos: 2, num_frames: 4}\n")
    assert len(chosen_videos(run)) == 2
    for given, message in (
        ([run, "--split", "val"], "`--split` does not go with a run's YAML"),
        ([run, "--video", "nobody"], "nobody"),
        (["synthetic", "--option", "num_videos"], "NAME=VALUE"),
        (["davi"], "unknown kind of dataset 'davi', and no folder; did you mean 'davis'"),
        (["davis", "--root", tmp_path / "nowhere"], "nowhere"),
        ([tmp_path / "none.yaml"], "none.yaml is no file"),
    ):
        with pytest.raises(InputError, match=message):
            chosen_videos(*given)
    run.write_text(
        f"eval_data: {save_videos(tmp_path / 'own', [replace(videos[0], video_id=name) for name in 'ab'])}\n"
    )
    (tmp_path / "own" / "a" / "frames" / "0.png").write_bytes(b"damaged")
    assert [video.video_id for video in chosen_videos(run, "--video", "b")] == ["b"]
    run.write_text("train_data: []\n")
    with pytest.raises(InputError, match=r"run\.yaml has no videos"):
        chosen_videos(run)


@pytest.mark.parametrize(
    "words",
    ["evaluate --dataset OWN", "evaluate --dataset files --root OWN", "label --dataset OWN --prompts p.json",
     "adapt --domain x --dataset OWN"],
)  # fmt: skip
def test_an_output_among_the_videos_is_refused(tmp_path, words):
    """What is written there would keep their layout from being recognized the next time."""
    root = save_videos(tmp_path / "own", SyntheticVideos(1, 2, (32, 48)))
    command, *others = words.replace("OWN", str(root)).split()
    for output in (root, root / "out"):
        with pytest.raises(SystemExit, match=f"{output.name} lies in the folder of the videos"):
            main([command, "nowhere", *others, "--output", str(output)])
    assert len([*root.iterdir()]) == 1


@pytest.mark.parametrize("kind", ["files", "frames"])
def test_a_video_is_chosen_by_its_name_in_either_form_of_unicode(tmp_path, kind):
    name = "Käse"
    video = replace(SyntheticVideos(1, 2, (32, 48))[0], video_id=unicodedata.normalize("NFD", name))
    root = save_videos(tmp_path / "my.videos", [video], "JPEGImages/{v}/{t}.png", "Annotations/{v}/{t}.png")
    for form in ("NFC", "NFD"):
        (chosen,) = chosen_videos(kind, "--root", root, "--video", unicodedata.normalize(form, name))
        assert unicodedata.normalize("NFC", chosen.video_id) == name
        assert chosen.domain == {"files": "my.videos", "frames": "frames"}[kind]


def test_a_video_is_chosen_beside_damaged_ones_whose_ids_nothing_tells(damaged_rows):
    """Two data sets as `datasets` saves them, each with a damaged row."""
    assert [video.video_id for video in chosen_videos(damaged_rows, "--video", "good 1")] == ["good 1"]
    with pytest.raises(
        InputError, match=r"\['bad 1'\].*not have; 2 of its videos cannot be read, the first: video 1: 'bad 0'"
    ):
        chosen_videos(damaged_rows, "--video", "bad 1")


@pytest.mark.parametrize(
    "words, message",
    [
        ("track m v --output o --device cuda:99", "'cuda:99' is no device that"),
        ("convert m --output o --push-to-hug x", "did you mean '--push-to-hub'?"),
        ("convert m", "the following arguments are required: --output"),
        ("convert m --to original --output o --push-to-hub x", "does not go with --to original"),
        ("convert m --to sam3 --output o", "--into, the file or folder of SAM 3"),
        ("convert m --to original --domain d --output o", "--domain does not go with --to original"),
        ("evaluate --dataset davis --output o", "at least one MODEL or --predictions is needed"),
        ("label m --dataset davis --prompts p.json --output o", "`--prompts` goes with a folder of videos"),
        (f"experts m --dataset davis --output {__file__}/x", f"must be a folder, but {__file__} is a file"),
    ],
)
def test_mistaken_options_are_named_at_once(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["track", "evaluate", pytest.param("experts", marks=pytest.mark.slow), "convert"])
def test_original_checkpoints_are_read_with_their_experts(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "in.mp4", SyntheticVideos(1, 2, (96, 128), seed=3)[0].frames, fps=5)
    data = ["--dataset", "synthetic", "--option", "num_videos=1", "--option", "num_frames=3"]
    rest = {"track": ["in.mp4", "--box", "10,10,60,60", "--output", "out.mp4"], "convert": ["--output", "out"]}
    original = [str(CHECKPOINT), "--config", str(CONFIG), "--experts", str(EXPERTS)]
    main([command, *original, *rest.get(command, [*data, "--output", "out"])])
    printed = capsys.readouterr()
    assert re.search(r"Written: .*out.*\n$", printed.out) and "are new" not in printed.err
    bars = re.findall(r"(?:^|[\r\n])[^\r\n]*\|[^\r\n]*\d+/(\d+) \[", printed.err)
    assert "0" not in bars and not re.search(r"(?<![\d.])0it", printed.err) and (command == "convert" or bars)


def test_what_goes_with_an_original_checkpoint_is_told(tmp_path, monkeypatch, model_folder):
    write_video(tmp_path / "in.mp4", SyntheticVideos(1, 2, (96, 128), seed=3)[0].frames, fps=5)
    monkeypatch.chdir(tmp_path)
    for model, message in (
        ([CHECKPOINT], r"give the model's YAML as `original_config` \(`--config` of a command\)"),
        ([model_folder, "--config", "x.yaml"], r"`--experts` and `--config` of a command\) go with an original"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["track", *map(str, model), "in.mp4", "--box", "10,10,60,60", "--output", "out.mp4"])
    run = ["--model_name_or_path", str(model_folder), "--num_experts", "3", "--output_dir", "out"]
    with pytest.raises(SystemExit, match="`ignore_mismatched_sizes=True` gives the model new experts"):
        main(["train", "smoke", *run])
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
