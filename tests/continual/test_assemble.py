"""LoRAs that were trained apart become one model that routes each domain to its own."""

import runpy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from helpers.reference import ROOT, load_reference
from samoe_hf import SamoeModel
from samoe_hf.continual.assemble import _discriminants, assemble, fit_routers, routed_right
from samoe_hf.data import ClipCollator, ClipDataset, SyntheticVideos
from samoe_hf.evaluation.evaluate import evaluate_videos, mean_iou, segment_video
from samoe_hf.model.expert_layer import expert_modules, route_all_to
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.loras import read_lora
from samoe_hf.training.arguments import ModelArguments

ATTENTION = r"memory_attention\.layers\.\d+\.self_attn\.[qkv]_proj"
DOMAINS = ("shapes", "blobs")


def make_lora(base, folder, seed, **settings):
    torch.manual_seed(seed)
    base.requires_grad_(False)
    made = get_peft_model(base, LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ATTENTION, **settings}))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    made.save_pretrained(folder)
    made.unload()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base without effective experts, and two LoRAs of different ranks and layers."""
    folder = tmp_path_factory.mktemp("parts")
    reference = load_reference("nano", with_experts=False)
    reference.model.save_pretrained(folder / "base")
    build_processor(reference.model.config).save_pretrained(folder / "base")
    make_lora(reference.model, folder / "shapes", 1)
    make_lora(reference.model, folder / "blobs", 2, r=3, lora_alpha=6, target_modules=r"memory_attention.*\.[kv]_proj")
    return folder


def videos(seed=1):
    return {domain: SyntheticVideos(6, 4, (64, 64), domain=domain, seed=seed) for domain in DOMAINS}


@pytest.fixture(scope="module")
def assembled(folder):
    loras = {domain: folder / domain for domain in DOMAINS}
    return assemble(folder / "base", loras, videos(), num_frames=16, experts_per_lora=2, show_progress_bar=False)


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
        weight, bias = _discriminants([middle, sides], per_domain)
        return [
            ((x @ weight.T + bias).argmax(dim=1) // per_domain == i).double().mean()
            for i, x in enumerate((middle, sides))
        ]

    assert min(right(4)) > 0.99 and min(right(1)) < 0.7


def test_tokens_that_never_vary_give_finite_routers():
    weight, bias = _discriminants([torch.ones(10, 4).double(), torch.ones(10, 4).double()], 3)
    assert weight.isfinite().all() and bias.isfinite().all()


@pytest.mark.parametrize(
    "loras, message",
    [
        ({"shapes": "shapes", "night": "blobs"}, "none of the domain 'night'; there are 'shapes', 'blobs'"),
        ({"shapes": None}, "at least one LoRA"),
    ],
)
def test_what_cannot_be_assembled_is_refused(folder, loras, message):
    loras = {name: lora and folder / lora for name, lora in loras.items()}
    with pytest.raises(ValueError, match=message):
        assemble(folder / "base", loras, videos(), show_progress_bar=False)


def test_a_base_with_experts_of_its_own_is_refused(folder, model_folder):
    with pytest.raises(ValueError, match="has experts with an effect"):
        assemble(model_folder, {"shapes": folder / "shapes"}, videos(), show_progress_bar=False)


def test_routers_need_as_many_domains_as_experts_can_share(assembled):
    with pytest.raises(ValueError, match="as many domains as 4 experts can share, got 3"):
        fit_routers(assembled, None, [[], [], []], 4)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["assemble.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "assemble.py"), run_name="__main__")


def test_the_script_writes_a_model(monkeypatch, folder, tmp_path, capsys):
    sources = [f"{{kind: synthetic, domain: {d}, num_videos: 3, num_frames: 3, image_size: [64, 64]}}" for d in DOMAINS]
    (tmp_path / "run.yaml").write_text("train_data:\n" + "".join(f"  - {source}\n" for source in sources))
    loras = [folder / domain for domain in DOMAINS]
    common = ["--frames", 6, "--device", "cpu", "--experts-per-lora", 1, "--token-routers"]
    run(monkeypatch, folder / "base", *loras, "--dataset", tmp_path / "run.yaml", "--output", tmp_path / "a", *common)
    assert "2 experts of rank 3" in capsys.readouterr().out
    datasets = ["--dataset", sources[0], "--dataset", sources[1]]
    run(monkeypatch, folder / "base", *loras, *datasets, "--output", tmp_path / "b", *common)
    first, second = (SamoeModel.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    for arguments, message in [
        ([f"night={loras[0]}", "--dataset", tmp_path / "run.yaml"], "'night' is none of the dataset's domains"),
        ([*loras, "--dataset", "nothing"], "must be a folder, a run's YAML file or"),
        ([loras[0], loras[0], "--dataset", tmp_path / "run.yaml"], "Two LoRAs have the name 'shapes'"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, folder / "base", *arguments, "--output", tmp_path / "c", *common)
        assert message in stopped.value.code and not (tmp_path / "c").exists()


def test_each_lora_becomes_a_domain(monkeypatch, folder, tmp_path, capsys):
    """Domains that the base is good on have no experts; a video gets its LoRA's output."""
    source = "{{kind: synthetic, domain: {}, num_videos: 30, num_frames: 2, image_size: [64, 64]}}"
    datasets = [text for d in (*DOMAINS, "stripes") for text in ("--dataset", source.format(d))]
    loras = [f"{d}={folder / d}" for d in DOMAINS] + ["stripes="]
    run(monkeypatch, folder / "base", *loras, *datasets, "--output", tmp_path / "out", "--device", "cpu")
    assert "blobs                30" in capsys.readouterr().out
    model = SamoeModel.from_pretrained(tmp_path / "out")
    assert [(d["name"], d["num_experts"]) for d in model.config.domains] == [
        ("shapes", 1),
        ("blobs", 1),
        ("stripes", 0),
    ]
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
        return mean_iou(evaluate_videos(model, processor, held_out, show_progress_bar=False))

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
    model = assemble(tmp_path / "base", {domain: tmp_path / domain for domain in domains}, of_domains)
    assert all(module.lora_B.any() for _, module in expert_modules(model))
    together = {domain: score(model, domain) for domain in domains}
    print(f"\nmean IoU of each LoRA alone {alone}, assembled {together}")
    for domain in domains:
        assert alone[domain] > 0.4 and together[domain] >= 0.95 * alone[domain]


def test_the_mode_of_the_model_is_restored_after_an_error(assembled):
    processor = build_processor(assembled.config)
    assembled.train()
    try:
        for fit in (fit_routers, routed_right):
            with pytest.raises(ValueError, match="has no video with an object"):
                fit(assembled, processor, [[], []], 4, show_progress_bar=False)
            assert assembled.training
    finally:
        assembled.eval()
