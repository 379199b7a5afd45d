"""`--lora_rank auto`: what does not matter of a domain's experts is left out, within a budget."""

import json
import math

import pytest
import torch
from PIL import Image

from helpers.domains import add_learned_domain, new_model
from samoe_hf import SamoeModel
from samoe_hf.commands import adapt as command
from samoe_hf.continual import sizes
from samoe_hf.continual.adapt import adapt
from samoe_hf.data.synthetic import SyntheticVideos
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.ranks import set_ranks
from samoe_hf.training.trainer import build_trainer

RUN = """
train_data: [{kind: synthetic, domain: blobs, num_videos: NUM, num_frames: 2, image_size: [64, 64], seed: 1}]
eval_fraction: 0.2
num_frames: 2
num_correction_clicks: 1
max_steps: 1
num_experts: 2
expert_modules: [qkv, q_proj, v_proj]
learning_rate: 1.0e-2
report_to: none
save_strategy: "no"
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with a domain."""
    folder, model = tmp_path_factory.mktemp("base"), new_model()
    add_learned_domain(model, "first", 1, num_experts=3, num_experts_per_tok=1, lora_rank=2)
    model.save_pretrained(folder, processor=build_processor(model.config))
    return folder


def write_run(folder, num):
    (folder / "run.yaml").write_text(RUN.replace("NUM", str(num)))
    return str(folder / "run.yaml")


def run_command(*words):
    command.run(command.parse_arguments([*map(str, words)]))


def num_bytes(model, name):
    return sum(4 * p.numel() for _, experts in domain_modules(model, name) for p in experts.parameters())


def read_sizes(folder):
    sizes = json.loads((folder / "adaptation.json").read_text())["sizes"]
    return sizes, [sizes[name] for name in ("budget", "videos", "trained_on")]


def test_a_domain_is_as_large_as_it_needs_to_be(base, tmp_path, capsys):
    words = [base, "--domain", "new", "--dataset", write_run(tmp_path, 10), "--output", tmp_path / "out"]
    run_command(*words, "--lora_rank", "auto", "--budget", "150kB")
    printed, model = capsys.readouterr().out, SamoeModel.from_pretrained(tmp_path / "out")
    found, tried_on = read_sizes(tmp_path / "out")
    assert tried_on == [150_000, 2, False]
    assert num_bytes(model, "new") == found["chosen"] <= 150_000 < found["tried"][0]["bytes"]
    assert found["tried"][0]["ranks"] == [16, 16, 16] and found["tried"][0]["loss"] == 0
    assert all(one["bytes"] > other["bytes"] for one, other in zip(found["tried"], found["tried"][1:], strict=False))
    assert found["reason"] in printed and "Written: the model, adaptation.json, adaptation.png, sizes.png" in printed
    assert Image.open(tmp_path / "out" / "sizes.png").width > 400
    before = SamoeModel.from_pretrained(base).state_dict()
    for name, tensor in model.state_dict().items():
        kept = tensor[: len(before[name])] if name.startswith("domain_gate.") else tensor
        assert ".domain_new." in name or torch.equal(kept, before[name])
    few = ["--train_data", "{kind: synthetic, num_videos: 1, num_frames: 2}", "--eval_fraction", "0"]
    run_command(tmp_path / "out", *words[1:-1], tmp_path / "again", "--lora_rank", "auto", *few)  # from unequal ranks
    assert "The experts may have 4MB; `--budget` says otherwise." in capsys.readouterr().out
    assert read_sizes(tmp_path / "again")[1] == [4_000_000, 1, True]


@pytest.fixture
def domain(monkeypatch):
    """A model whose domain is scored as a function of how much of it is left: the bytes, and the share of B."""
    model = new_model()
    add_learned_domain(model, "a", 1, num_experts=1, num_experts_per_tok=1, lora_rank=8)
    whole = num_bytes(model, "a")

    def choose(score, budget=10**9, num_videos=4):
        def scores(model, *_):
            left = sum(float(experts.lora_B.any(dim=1).sum()) for _, experts in domain_modules(model, "a"))
            share = left / sum(experts.lora_rank for _, experts in domain_modules(model, "a"))
            return [score(share, number) for number in range(num_videos)]

        monkeypatch.setattr(sizes, "video_scores", scores)
        videos = SyntheticVideos(num_videos, 3, (64, 64), domain="blobs")
        return model, whole, sizes.choose_size(model, build_processor(model.config), "a", budget, videos, False)

    return choose


@pytest.mark.parametrize("needed", [0.2, 0.6])
def test_the_smallest_size_that_loses_nothing_is_found(domain, needed):
    model, whole, found = domain(lambda share, _: 0.8 if share >= needed else 0.7)
    left = sum(experts.lora_rank for _, experts in domain_modules(model, "a"))
    assert needed <= left / (8 * found.tried[0].layers) <= needed * sizes.PRECISION + 0.05
    assert num_bytes(model, "a") == found.chosen < whole == found.tried[0].bytes
    assert found.reason == "The next smaller one may lose more than 1 point of J&F."


def test_a_loss_counts_with_its_error(domain):
    _, whole, found = domain(lambda share, number: 0.8 if share == 1 else 0.8 + (0.05 if number % 2 else -0.05))
    assert found.chosen == whole and found.tried[1].loss == pytest.approx(0) and found.tried[1].error > 0.02


@pytest.mark.parametrize("budget", [20_000, 2_000, 1_300])
def test_the_budget_comes_first_and_may_be_less_than_all_layers_need(domain, budget):
    model, whole, found = domain(lambda share, _: share, budget=budget)
    assert num_bytes(model, "a") == found.chosen <= budget < whole
    assert found.reason == f"The budget of {budget // 1000} kB allows no more, which costs more than 1 point of J&F."
    assert len({one.bytes for one in found.tried}) == len(found.tried)


def test_a_budget_of_some_layers_is_no_too_little_one():
    model = new_model()
    add_learned_domain(model, "a", 1, num_experts=1, num_experts_per_tok=1, lora_rank=8)
    sizes.raise_ranks(model, "a", 2_000)
    assert {experts.lora_rank for _, experts in domain_modules(model, "a")} == {sizes.TRAINED_RANK}


def test_where_nothing_is_scored_or_all_is_equal(domain):
    _, whole, found = domain(lambda *_: math.nan)
    assert found.chosen == whole and found.reason.startswith("No video could be scored")
    model, whole, found = domain(lambda *_: 0.5)
    assert found.chosen < whole / 20 and found.reason == "There is nothing smaller."
    assert sum(experts.lora_rank for _, experts in domain_modules(model, "a")) == 1
    assert len({one.bytes for one in found.tried}) == len(found.tried)


def test_what_does_not_go_with_it_is_refused(base, tmp_path):
    run = write_run(tmp_path, 3)
    words = [base, "--domain", "new", "--dataset", run, "--output", tmp_path / "out"]
    for options, message in (
        (["--budget", "1MB"], "`--budget` goes with `--lora_rank auto`"),
        (["--lora_rank", "2", "--budget", "1MB"], "`--budget` goes with `--lora_rank auto`"),
        (["--lora_rank", "auto", "--budget", "big"], "`--budget` must be a size of experts such as 4MB, got 'big'"),
        (["--lora_rank", "auto", "--num_experts", "0"], "`lora_rank` auto chooses ranks .* domain 'new' has none"),
        (["--lora-rank", "auto", "--budget", "0.1kB"], "A budget of 0 kB is too little: experts of rank 1 in a single"),
    ):
        with pytest.raises(ValueError, match=message):
            run_command(*words, *options)
    for rank, message in (
        ("auto", "auto is chosen by `samoe adapt … --lora_rank auto` alone"),
        ("x", "expected an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            build_trainer([run, "--model_name_or_path", str(base), "--output_dir", "o", "--lora_rank", rank])
    assert not (tmp_path / "out").exists()
    model = new_model()
    with pytest.raises(ValueError, match="The model has no domain 'x'"):
        set_ranks(model, "x", 2)
    result = adapt(base, "new", [run, "--max_steps", "1"], tmp_path / "fixed")
    assert result.sizes is None and not (tmp_path / "fixed" / "sizes.png").exists()
