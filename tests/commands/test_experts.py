"""`samoe experts`, run as users run it."""

from pathlib import Path

import pytest

from samoe_hf import SamoeModel

QUERY = "memory_attention.layers.1.cross_attn_image.q_proj"


@pytest.fixture
def two_domains(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    source = "kind: synthetic, num_videos: 1, num_frames: 3, image_size: [96, 96], seed: 5"
    path.write_text(f"eval_data:\n  - {{{source}, domain: shapes}}\n  - {{{source}, domain: blobs}}\n")
    return path


def test_it_shows_two_domains_and_maps_the_chosen_video_and_layer(samoe, base_folder, two_domains, tmp_path):
    """That it maps the first video of each domain by default is in the walk-through."""
    layers = ["memory_attention.layers.0.self_attn.v_proj", QUERY]
    SamoeModel.from_pretrained(base_folder, expert_modules=layers).save_pretrained(tmp_path / "model")
    words = [tmp_path / "model", "--dataset", two_domains, "--output", tmp_path / "out", "--routing-video", 1]
    words += ["--routing-module", "memory_attention.layers.0.self_attn.v_proj", "--routing-object", 1]
    printed = samoe("experts", *words)
    assert "layer 1 cross q" in printed and "domain_information" in printed and "2/2" in printed
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {name for name in names if "routing" in name} == {f"routing_blobs_blobs_5_00000.{s}" for s in ("png", "mp4")}
    assert "domains.png" in names


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--routing-video", "2"], "`--routing-video` must be an id or a number below 2, got '2'"),
        (["--routing-module", QUERY.replace("q_proj", "k_proj")], "tokens are image positions"),
        (["--routing-video", "0", "--routing-object", "77"], "`--routing-object` 77 is not in shapes_5_00000"),
        (["--routing-object", "77"], "`--routing-object` 77 is in none of the videos"),
    ],
)
def test_bad_choices_are_refused_at_once(samoe, model_folder, two_domains, tmp_path, arguments, message):
    words = [model_folder, "--dataset", two_domains, "--output", tmp_path / "out", *arguments]
    assert message in samoe("experts", *words, fails=True)
    assert not (tmp_path / "out").exists()
