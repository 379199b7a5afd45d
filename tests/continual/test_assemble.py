"""LoRAs that were trained apart become domains of one model."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from helpers.loras import ATTENTION, DOMAINS, save_base_and_loras
from samoe_hf import SamoeModel
from samoe_hf.cli import main
from samoe_hf.commands.assemble import match_domains
from samoe_hf.continual.assemble import assemble
from samoe_hf.data import SyntheticVideos
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.training.arguments import ModelArguments

SOURCE = "{{kind: synthetic, domain: {}, num_videos: 6, num_frames: 2, image_size: [64, 64]}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base_and_loras(tmp_path_factory.mktemp("parts"))


def test_each_lora_becomes_a_domain(folder, tmp_path, capsys):
    """Domains that the base is good on have no experts; a video gets its LoRA's output."""
    datasets = [text for name in (*DOMAINS, "stripes") for text in ("--dataset", SOURCE.format(name))]
    loras = [*(f"{name}={folder / name}" for name in DOMAINS), "stripes="]
    main(["assemble", str(folder / "base"), *loras, *datasets, "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert "blobs                6" in capsys.readouterr().out
    model = SamoeModel.from_pretrained(tmp_path / "out")
    assert [(d["name"], d["num_experts"]) for d in model.config.domains] == [
        ("shapes", 1), ("blobs", 1), ("stripes", 0)
    ]  # fmt: skip
    processor = build_processor(model.config)
    video = SyntheticVideos(1, 4, (64, 64), domain="blobs", seed=2)[0]
    alone = get_peft_model(SamoeModel.from_pretrained(folder / "base"), LoraConfig(target_modules=ATTENTION))
    alone.load_adapter(str(folder / "blobs"), "blobs")
    alone.set_adapter("blobs")
    expected, _ = segment_video(alone.get_base_model(), processor, video)
    masks, _ = segment_video(model, processor, video, domain="blobs")
    assert (masks != expected).mean() < 1e-3
    plain, _ = segment_video(SamoeModel.from_pretrained(folder / "base"), processor, video)
    assert (segment_video(model, processor, video, domain="stripes")[0] == plain).all()


def test_nothing_is_said_of_new_experts_that_give_place_to_domains(base_folder):
    videos = {"plain": SyntheticVideos(2, 2, (64, 64))}
    with CaptureLogger(logging.get_logger("transformers.samoe_hf.model.loading")) as captured:
        assemble(base_folder, {"plain": None}, videos, show_progress_bar=False)
        ModelArguments(model_name_or_path=str(base_folder), domain="plain").load()
    assert captured.out == ""


def test_datasets_are_given_once_or_for_each_lora(tmp_path):
    sources = [SOURCE.format(name) for name in DOMAINS]
    run = tmp_path / "run.yaml"
    run.write_text("train_data:\n" + "".join(f"  - {source}\n" for source in sources))
    for datasets in ([str(run)], sources):
        loras, videos = match_domains(["a/shapes", "blobs=b"], datasets)
        assert loras == {"shapes": "a/shapes", "blobs": "b"}
        assert {name: of_domain[0].domain for name, of_domain in videos.items()} == {
            "shapes": "shapes",
            "blobs": "blobs",
        }


@pytest.mark.parametrize(
    ("loras", "dataset", "message"),
    [
        (["night=x"], "run.yaml", "'night' is none of the dataset's domains"),
        (["x"], "nothing", "`--dataset` must be a folder or the arguments of"),
        (["a/x", "b/x"], "run.yaml", "Two LoRAs have the name 'x'"),
    ],
)
def test_what_does_not_match_is_told_in_a_line(tmp_path, monkeypatch, loras, dataset, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("train_data:\n" + "".join(f"  - {SOURCE.format(name)}\n" for name in DOMAINS))
    with pytest.raises(ValueError, match=message):
        match_domains(loras, [dataset])
