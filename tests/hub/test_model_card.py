"""Model cards: what they say and do not say, and that the Hub takes their metadata."""

import copy

import pytest
from huggingface_hub import EvalResult, ModelCard
from PIL import Image

from helpers.reference import ROOT
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml
from samoe_hf.hub.model_card import CardContent, build_model_card, write_model_card
from samoe_hf.surgery.domains import add_domain

COMMIT = "0123456789" * 4


@pytest.fixture
def model(nano):
    """The reference model, as if it came from the Hub."""
    model = copy.deepcopy(nano.model)
    source = {"name_or_path": "facebook/sam2.1-hiera-tiny", "revision": COMMIT}
    model.origin.source = source | {"subfolder": None, "original_config": None}
    return model


def full_card(model) -> ModelCard:
    figures = (("MOSE", 0.71), ("OCID", 0.83))
    content = CardContent(
        eval_results=[EvalResult("mask-generation", n, n, "J&F", value, metric_name="J&F") for n, value in figures],
        usage_picture="pictures/usage.PNG", training={"learning_rate": 1e-4, "steps": 100},
        domains=["street scenes", "tables"], datasets=["tester/mose"], license="apache-2.0", language="en",
        tags=["ct"], limits=["Measured on two data sets only."],
    )  # fmt: skip
    return build_model_card(model, "tester/model", content, experts_only=True)


def test_what_is_known_is_told(model, monkeypatch):
    model.set_trainable("experts", "decoder")
    card = full_card(model)
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("facebook/sam2.1-hiera-tiny", "adapter")
    assert (data["license"], data["datasets"], data["library_name"]) == ("apache-2.0", ["tester/mose"], "transformers")
    assert {"ct", "samoe"} <= set(data["tags"])
    results = data["model-index"][0]["results"]
    assert [(r["dataset"]["name"], r["metrics"][0]["value"]) for r in results] == [("MOSE", 0.71), ("OCID", 0.83)]
    text = card.text
    for part in (
        f"at commit `{COMMIT}`", 'SamoeModel.from_pretrained("tester/model")', "| experts | 4 of rank 4, alpha 2.0 |",
        "| parameters of experts and routers | 68,672 |", "tensors, such as `mask_decoder.",
        "- street scenes\n- tables\n- tester/mose\n", "| learning_rate | 0.0001 |\n| steps | 100 |",
        "| OCID | J&F | 0.83 |", "(expert_usage.png)", "- Measured on two data sets only.",
        "## Licence\n\napache-2.0",
    ):  # fmt: skip
        assert part in text, part
    assert not any(part in text for part in ("trust_remote_code", "Not stated", "{{", "\n\n\n"))
    monkeypatch.setattr(SamoeModel, "_auto_class", "AutoModel")
    text = build_model_card(model, "tester/model").text
    assert 'AutoModel.from_pretrained("tester/model", trust_remote_code=True)' in text


def test_domains_are_told():
    model = SamoeModel(SamoeConfig(**read_yaml(ROOT / "configs" / "model_nano.yaml")))
    add_domain(model, "night", num_experts=3, lora_rank=2)
    assert "LoRA experts for 1 domain:\nnight. A gate" in build_model_card(model, "tester/model").text
    add_domain(model, "day", num_experts=0)
    text = build_model_card(model, "tester/model", CardContent()).text
    assert "LoRA experts for 2 domains:\nnight, day. A gate chooses" in text and "gets the base model's output." in text
    table = [line for line in text.splitlines() if line.startswith("| experts")]
    assert table == [
        "| experts of night | 3 of rank 2, alpha 4.0, 2 for each token |",
        "| experts of day | none, the base is good as it is |",
    ]
    assert "chosen for each token" not in text


def test_nothing_is_claimed_that_is_not_known(nano):
    model = copy.deepcopy(nano.model)
    card = build_model_card(model, "model")
    data = card.data.to_dict()
    assert not {"license", "base_model", "datasets", "model-index", "language"} & set(data)
    assert str(nano.folder) not in str(card), "paths of the author's machine are nobody's business"
    assert "`sam2.1_hiera_nano.pt`, a local file" in card.text
    sections = {part.split("\n")[0]: part for part in card.text.split("\n## ")}
    for section in ("Data and domains", "Training", "Licence"):
        assert "Not stated" in sections[section]
    assert "None given." in sections["Results"] and "No picture" in sections["Expert usage"]
    scratch = SamoeModel(SamoeConfig(**read_yaml(ROOT / "configs" / "model_nano.yaml")))
    assert "started from random weights" in build_model_card(scratch, "model").text


def test_the_picture_comes_along(model, tmp_path):
    picture = tmp_path / "usage.png"
    Image.new("RGB", (4, 4)).save(picture)
    (tmp_path / "out").mkdir()
    write_model_card(model, tmp_path / "out", "tester/model", CardContent(usage_picture=picture))
    assert (tmp_path / "out" / "expert_usage.png").read_bytes() == picture.read_bytes()
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "transformers"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_model_card(model, tmp_path / "out", "tester/model", CardContent(usage_picture=tmp_path / "nowhere.png"))


def test_the_template_is_at_the_top():
    assert (ROOT / "model_card.md").read_text() == (ROOT / "samoe_hf" / "hub" / "model_card.md").read_text()
