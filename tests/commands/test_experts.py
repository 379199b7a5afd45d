"""`samoe experts`, run as users run it."""

import fnmatch
import re
from pathlib import Path
from unittest.mock import Mock

import pytest

from helpers.reference import ROOT
from samoe_hf import SamoeModel
from samoe_hf.commands.experts import choose_videos
from samoe_hf.data import SyntheticVideos

QUERY = "memory_attention.layers.1.cross_attn_image.q_proj"


@pytest.fixture
def two_domains(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    source = "kind: synthetic, num_videos: 1, num_frames: 2, image_size: [96, 96], seed: 5"
    path.write_text(f"eval_data:\n  - {{{source}, domain: shapes}}\n  - {{{source}, domain: blobs}}\n")
    return path


def test_it_shows_two_domains_and_maps_the_first_video_of_each_in_the_chosen_layer(
    samoe, base_folder, two_domains, tmp_path, monkeypatch
):
    layers = ["memory_attention.layers.0.self_attn.v_proj", QUERY]
    SamoeModel.from_pretrained(base_folder, expert_modules=layers).save_pretrained(tmp_path / "model")
    words = [tmp_path / "model", "--dataset", two_domains, "--output", tmp_path / "out"]
    words += ["--routing-module", "memory_attention.layers.0.self_attn.v_proj", "--routing-object", 1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("samoe_hf.analysis.routing.RoutingMaps.save", Mock(side_effect=KeyboardInterrupt))
        samoe("experts", *words)
    printed = samoe("experts", *words)  # the same again
    assert "layer 1 cross q" in printed and "domain_information" in printed and "2/2" in printed
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {name for name in names if "routing" in name} == {
        f"routing_{kind}_{kind}_5_00000.{suffix}" for kind in ("shapes", "blobs") for suffix in ("png", "mp4")
    }
    written = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert "has an earlier run's files; give another, or `--overwrite`" in samoe("experts", *words, fails=True)
    assert written == {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert "Written: " in samoe("experts", *words, "--overwrite")
    promised = re.findall(r"`([\w*]+\.(?:csv|json|png|mp4))`", (ROOT / "docs" / "experts.md").read_text())
    assert len(promised) > 5 and all(fnmatch.filter(names, pattern) for pattern in promised)


def test_videos_are_chosen_by_number_or_id():
    videos = [SyntheticVideos(1, 2, (32, 32), domain=domain)[0] for domain in ("shapes", "blobs")]
    assert choose_videos(videos, ["1", videos[1].video_id], None) == [videos[1]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--routing-video", "2"], "`--routing-video` must be an id or a number below 2, got '2'"),
        (["--routing-module", QUERY.replace("q_proj", "k_proj")], "tokens are image positions"),
        (["--routing-video", "0", "--routing-object", "77"], "`--routing-object` 77 is not in shapes_5_00000"),
        (["--routing-object", "77"], "`--routing-object` 77 is in none of the videos"),
        (["--dead-share", "5"], "`--dead-share` must be from 0 to 1, got 5.0"),
    ],
)
def test_bad_choices_are_refused_at_once(samoe, model_folder, two_domains, tmp_path, arguments, message):
    words = [model_folder, "--dataset", two_domains, "--output", tmp_path / "out", *arguments]
    assert message in samoe("experts", *words, fails=True)
    assert not (tmp_path / "out").exists()
