"""Computed token routers send each domain to the experts that its LoRA has become."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

import token_routers
from helpers.loras import DOMAINS, save_base_and_loras
from helpers.reference import ROOT
from helpers.results import mean_j
from samoe_hf import SamoeModel
from samoe_hf.data import ClipCollator, ClipDataset, SyntheticVideos
from samoe_hf.evaluation.evaluate import evaluate_videos
from samoe_hf.model.expert_layer import expert_modules
from samoe_hf.model.expert_router import route_all_to
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.loras import read_lora
from samoe_hf.training.arguments import ModelArguments
from token_routers import assemble_with_routers, discriminants, routed_right


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base_and_loras(tmp_path_factory.mktemp("parts"))


def videos(seed=1):
    return {domain: SyntheticVideos(6, 4, (64, 64), domain=domain, seed=seed) for domain in DOMAINS}


@pytest.fixture(scope="module")
def assembled(folder):
    loras = {domain: folder / domain for domain in DOMAINS}
    settings = {"num_frames": 16, "experts_per_lora": 2, "show_progress_bar": False}
    return assemble_with_routers(folder / "base", loras, videos(), **settings)


def test_the_experts_are_the_loras(assembled, folder):
    config = assembled.config
    assert (config.num_experts, config.num_experts_per_tok, config.lora_rank, config.lora_alpha) == (4, 1, 3, 6.0)
    assert all(name.startswith("memory_attention") for name in assembled.expert_module_names)
    for expert, domain in ((0, "shapes"), (1, "shapes"), (2, "blobs"), (3, "blobs")):
        for name, (A, B, scale) in read_lora(folder / domain).layers.items():
            module = assembled.get_submodule(name)
            read = torch.randn(5, module.in_features)
            with route_all_to(assembled, expert), torch.no_grad():
                result = module(read) - nn.functional.linear(read, module.weight, module.bias)
            torch.testing.assert_close(result, scale * read @ A.T @ B.T, atol=1e-6, rtol=1e-4)


def test_domains_go_to_their_own_experts(assembled):
    held_out = [of_domain for of_domain in videos(seed=2).values()]
    shares = routed_right(assembled, build_processor(assembled.config), held_out, 12, show_progress_bar=False)
    assert set(shares) == set(assembled.expert_module_names)
    assert torch.stack(list(shares.values())).mean(dim=0).min() > 0.8
    swapped = routed_right(assembled, build_processor(assembled.config), held_out[::-1], 12, show_progress_bar=False)
    assert torch.stack(list(swapped.values())).mean(dim=0).max() < 0.2


def test_discriminants_tell_a_domain_between_two_clusters_of_another():
    torch.manual_seed(0)
    middle = torch.randn(3000, 3, dtype=torch.float64)
    sides = torch.randn(3000, 3, dtype=torch.float64) + torch.tensor([8.0, 0, 0]) * torch.ones(
        3000, 1
    ).bernoulli_().mul(2).sub(1)

    def right(per_domain):
        weight, bias = discriminants([middle, sides], per_domain)
        return [
            ((x @ weight.T + bias).argmax(dim=1) // per_domain == i).double().mean()
            for i, x in enumerate((middle, sides))
        ]

    assert min(right(4)) > 0.99 and min(right(1)) < 0.7


def test_tokens_that_never_vary_give_finite_routers():
    weight, bias = discriminants([torch.ones(10, 4).double(), torch.ones(10, 4).double()], 3)
    assert weight.isfinite().all() and bias.isfinite().all()


def test_a_base_with_experts_of_its_own_is_refused(folder, model_folder):
    with pytest.raises(ValueError, match="has experts with an effect"):
        assemble_with_routers(model_folder, {"shapes": folder / "shapes"}, videos(), show_progress_bar=False)


def test_the_program_writes_a_model(folder, tmp_path, capsys):
    sources = [f"{{kind: synthetic, domain: {d}, num_videos: 3, num_frames: 3, image_size: [64, 64]}}" for d in DOMAINS]
    datasets = [text for source in sources for text in ("--dataset", source)]
    settings = ["--frames", "6", "--device", "cpu", "--experts-per-lora", "1", "--output", str(tmp_path / "out")]
    token_routers.main([str(folder / "base"), *(str(folder / domain) for domain in DOMAINS), *datasets, *settings])
    assert "2 experts of rank 3" in capsys.readouterr().out
    assert SamoeModel.from_pretrained(tmp_path / "out").config.num_experts == 2


@pytest.mark.slow
def test_assembled_loras_are_nearly_as_good_as_each_alone(tmp_path):
    """LoRAs in all linear layers but the decoder's, trained with plain PEFT on two domains that the base cannot see.

    Prints the scores; run with `-s`.
    """
    base = ModelArguments(model_config=str(ROOT / "configs" / "model_nano.yaml")).load()
    base.set_trainable(r"(?!.*(lora_|router)).*")
    processor = build_processor(base.config)
    processor.save_pretrained(tmp_path / "base")

    def train(model, domain, steps, learning_rate):
        arguments = TrainingArguments(
            tmp_path / "run", max_steps=steps, per_device_train_batch_size=4, learning_rate=learning_rate,
            lr_scheduler_type="cosine", warmup_steps=steps // 10, save_strategy="no", report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        clips = ClipDataset(SyntheticVideos(2000, 4, domain=domain, seed=1), processor, num_frames=4, seed=0)
        Trainer(model.train(), arguments, train_dataset=clips, data_collator=ClipCollator()).train()

    def score(model, domain):
        held_out = list(SyntheticVideos(32, 12, domain=domain, seed=3))
        return mean_j(evaluate_videos(model, processor, held_out, show_progress_bar=False))

    train(base, "shapes", 280, 1e-3)
    base.save_pretrained(tmp_path / "base")
    target = r"(vision_encoder\..*\.(qkv|proj|proj_in|proj_out)|memory_attention\..*\.([qkvo]_proj|linear\d))"
    alone, domains = {}, ("blobs", "stripes")
    for domain in domains:
        base = SamoeModel.from_pretrained(tmp_path / "base").requires_grad_(False)
        adapted = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=target))
        train(adapted, domain, 150, 2e-3)
        adapted.save_pretrained(tmp_path / domain)
        alone[domain] = score(base, domain)
    of_domains = {domain: SyntheticVideos(500, 4, domain=domain, seed=1) for domain in domains}
    model = assemble_with_routers(tmp_path / "base", {domain: tmp_path / domain for domain in domains}, of_domains)
    assert all(module.lora_B.any() for _, module in expert_modules(model))
    together = {domain: score(model, domain) for domain in domains}
    print(f"\nmean IoU of each LoRA alone {alone}, assembled {together}")
    for domain in domains:
        assert alone[domain] > 0.4 and together[domain] >= 0.95 * alone[domain]
