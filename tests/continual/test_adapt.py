"""One command adds a domain: new experts are trained, the gate learns it, and nothing else changes."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from PIL import Image

from helpers.own_videos import save_videos
from helpers.processes import ENVIRONMENT, LAUNCH, run_two
from helpers.reference import ROOT, assert_tensors
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.commands import adapt as command
from samoe_hf.continual import adapt as adapting
from samoe_hf.continual import fit_gate as gate_fitting
from samoe_hf.continual import start
from samoe_hf.continual.adapt import Adaptation, adapt
from samoe_hf.continual.fit_gate import fit_gate
from samoe_hf.data.synthetic import SyntheticVideos
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.model.expert_layer import expert_modules
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import add_domain, copy_domain_experts
from samoe_hf.training.trainer import build_trainer

RUN = """
train_data: [{kind: synthetic, domain: DOMAIN, num_videos: 6, num_frames: 2, image_size: [64, 64], seed: 1}]
eval_data:
- {kind: synthetic, domain: blobs, num_videos: 1, num_frames: 2, image_size: [64, 64], seed: 2}
- {kind: synthetic, domain: stripes, num_videos: 1, num_frames: 2, image_size: [64, 64], seed: 2}
num_frames: 2
num_correction_clicks: 1
per_device_train_batch_size: 2
max_steps: 1
num_experts: 2
expert_modules: [qkv, q_proj, v_proj]
learning_rate: 1.0e-2
report_to: none
save_strategy: "no"
disable_tqdm: true
"""


def run_command(arguments: list[str]) -> None:
    command.run(command.parse_arguments(arguments))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    settings = yaml.safe_load((ROOT / "configs" / "model_nano.yaml").read_text())
    folder = tmp_path_factory.mktemp("base")
    model = SamoeModel(SamoeConfig(**settings))
    model.save_pretrained(folder)
    build_processor(model.config).save_pretrained(folder)
    return folder


def write_run(folder, domain):
    path = folder / f"{domain}.yaml"
    path.write_text(RUN.replace("DOMAIN", domain))
    return path


@pytest.fixture(scope="module")
def first(base, tmp_path_factory):
    """The base with a domain of blobs."""
    folder = tmp_path_factory.mktemp("first")
    result = adapt(base, "soft", [str(write_run(folder, "blobs"))], folder / "model")
    return folder / "model", result


def test_a_domain_is_added_with_its_gate_and_scores(base, first):
    folder, result = first
    model = SamoeModel.from_pretrained(folder)
    assert model.config.domain_names == ["soft"] and model.config.domains[0]["num_experts"] == 2
    assert result.gate_videos == 6 and model.domain_gate.counts.tolist() == [6]
    assert result.before.keys() == result.after.keys() >= {"eval_J", "eval_blobs_J&F", "eval_stripes_F"}
    assert result.routed == {"stripes": {"base": 1}, "blobs": {"soft": 1}}
    assert json.loads((folder / "adaptation.json").read_text())["routed"] == result.routed
    assert "stripes" in result.table() and "1 base" in result.table()
    plain = SamoeModel.from_pretrained(base).state_dict()
    assert_tensors(model, {name: x for name, x in plain.items() if "lora_" not in name and "router" not in name})
    files = [folder / "model.safetensors", folder / "domains" / "soft.safetensors"]
    assert sum(path.stat().st_size for path in files) < (base / "model.safetensors").stat().st_size / 4


def test_the_next_domain_changes_nothing_of_the_first(first, tmp_path, capsys):
    folder, _ = first
    run = write_run(tmp_path, "stripes")
    options = ["--like", "soft"]
    run_command(
        [str(folder), "--domain", "hard", "--dataset", str(run), "--output", str(tmp_path / "second"), *options]
    )
    printed = capsys.readouterr().out
    assert "The gate knows hard by 6 videos." in printed and "J&F before" in printed
    before, after = (SamoeModel.from_pretrained(path) for path in (folder, tmp_path / "second"))
    assert after.config.domain_names == ["soft", "hard"]
    kept = after.state_dict()
    for name, tensor in before.state_dict().items():
        assert torch.equal(kept[name][: len(tensor)] if name.startswith("domain_gate.") else kept[name], tensor)
    assert after.config.base_model == before.config.base_model


def test_a_domain_that_goes_on_is_said_to_be_learned_anew_and_whether_it_was_spoiled(first, tmp_path, monkeypatch):
    scores = iter([0.5, 0.1])
    monkeypatch.setattr(adapting, "domain_score", lambda *_, domain: {"soft": next(scores)}[domain])
    spoiled = adapt(first[0], "soft", [str(write_run(tmp_path, "blobs"))], tmp_path / "out")
    assert "The gate knew soft by 6 videos before. It learned it anew" in spoiled.describe()
    assert "The gate knew" not in first[1].describe()
    assert (spoiled.at_start, spoiled.at_end) == (0.5, 0.1)
    assert "Warning: training has spoiled the experts of soft as it was: " in spoiled.describe()
    assert "its videos have a J&F of 10.0, and had 50.0. Train more slowly (`--learning_rate`)." in spoiled.describe()
    assert "(`--like none`)" in replace(spoiled, started_from="hard").describe()
    assert "spoiled" not in replace(spoiled, at_end=0.495).describe() + first[1].describe()
    assert first[1].at_start is None


def test_a_domain_starts_from_experts_that_are_good_at_it(first, tmp_path, capsys, monkeypatch):
    def score(model, processor, videos, domain):
        assert len(videos) == 8 and all(1 < len(video) <= 8 and video.visible(0) for video in videos)
        return 0.4 if domain is None else 0.5

    monkeypatch.setattr(start, "domain_score", score)
    folder, _ = first
    run = write_run(tmp_path, "stripes")
    other = yaml.safe_load(run.read_text()) | {"eval_data": []}
    other["train_data"][0] |= {"seed": 7, "num_videos": 9}
    run.write_text(yaml.safe_dump(other))
    options = ["--like", "auto", "--learning_rate", "0"]
    run_command([str(folder), "--domain", "new", "--dataset", str(run), "--output", str(tmp_path / "out"), *options])
    result = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert result["started_from"] == "soft" and isinstance(result["at_start"], float)
    assert result["at_start"] == result["at_end"]
    assert "started from those of soft" in capsys.readouterr().out
    model = SamoeModel.from_pretrained(tmp_path / "out")
    pairs = zip(domain_modules(model, "soft"), domain_modules(model, "new"), strict=True)
    for (_, soft), (_, new) in pairs:
        assert torch.equal(soft.lora_A, new.lora_A) and torch.equal(soft.lora_B, new.lora_B)


def test_experts_of_the_same_kind_are_tried_on_the_first_frames_of_some_videos(first, monkeypatch):
    folder, _ = first
    model = SamoeModel.from_pretrained(folder)
    add_domain(model, "other_rank", **{**model.config.expert_settings(), "lora_rank": 1})
    settings = {name: value for name, value in model.config.domains[0].items() if name != "name"}
    add_domain(model, "new", **settings)
    scores, score = {}, start.domain_score

    def record(model, processor, videos, domain):
        scores[domain] = score(model, processor, videos, domain)
        return scores[domain]

    monkeypatch.setattr(start, "domain_score", record)
    monkeypatch.setattr(start, "MIN_ADVANTAGE", -1.0)
    videos = [SyntheticVideos(20, 12, (64, 64), domain="blobs")[number % 2] for number in range(4)]  # of the same names
    processor = build_processor(model.config)
    assert start.find_start(model, processor, "new", videos) == "soft"
    assert scores.keys() == {None, "soft"} and all(0 <= value <= 1 for value in scores.values())
    assert start.find_start(model, processor, "other_rank", videos) is None
    assert score(model, processor, [], "soft") == 0
    monkeypatch.setattr(start, "MIN_ADVANTAGE", 0.05)
    for of_soft, found in ((0.44, None), (0.46, "soft")):
        fixed = {None: 0.4, "soft": of_soft}
        monkeypatch.setattr(start, "domain_score", lambda *given, fixed=fixed: fixed[given[-1]])
        assert start.find_start(model, processor, "new", videos) == found
    copy_domain_experts(model, "soft", "new")
    assert start.find_start(model, processor, "new", videos) is None


def test_a_run_of_training_trains_one_domain_alone(first, tmp_path):
    folder, _ = first
    folders = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "o")]
    run = [str(write_run(tmp_path, "stripes")), *folders]
    no_experts = tmp_path / "no_experts.yaml"
    no_experts.write_text("\n".join(line for line in Path(run[0]).read_text().splitlines() if "expert" not in line))
    with pytest.raises(ValueError, match=r"`domain` must be one of the model's \('soft'\), got None"):
        build_trainer([str(no_experts), *folders])
    for options, message in (
        ("--domain soft --num_experts 3", "`num_experts` is 2 in domain 'soft', but 3 is given"),
        ("--domain hard --trainable memory", "`trainable` must be experts where a domain is trained"),
        ("--domain_like soft", "`domain_like` goes with `domain`"),
        ("--domain hard --domain_like z", "The model has no domain 'z'"),
        ("--domain soft --domain_like soft", "`domain_like` is for a new domain, but the model has 'soft'"),
        ("--domain hard --memory_selection score", "`memory_selection` is 'recent' in the model, and with 'score' its"),
        ("--domain hard --image_size 64", r"`image_size` is 128 in the model, .* other domains \(soft\) would track"),
    ):
        with pytest.raises(ValueError, match=message):
            build_trainer([*run, *options.split()])
    trainer = build_trainer([*run, "--domain", "hard", "--learning_rates", "{experts: 0.5}", "--image_size", "128"])
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(".domain_hard." in name for name in trained)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {0.5}


def write_folder(root, count):
    """Videos of blobs as people keep them."""
    videos = SyntheticVideos(count, 3, (64, 64), domain="blobs", seed=3)
    return save_videos(root, (replace(video, video_id=f"v{number}") for number, video in enumerate(videos)))


FOLDER_RUN = ["--max_steps=1", "--num_frames=2", "--num_correction_clicks=1", "--num_experts=2"]
FOLDER_RUN += ["--expert_modules=q_proj", "--disable_tqdm=true"]


@pytest.fixture
def learn_nothing(base, tmp_path, capsys):
    """Runs the command on a folder of videos, at a learning rate of 0; gives its results and what it printed."""

    def run(count):
        data = write_folder(tmp_path / "data", count)
        words = [str(base), "--domain", "soft", "--dataset", str(data), "--output", str(tmp_path / "out"), *FOLDER_RUN]
        run_command([*words, "--learning_rate", "0"])
        return json.loads((tmp_path / "out" / "adaptation.json").read_text()), capsys.readouterr().out

    return run


def test_of_a_folder_a_fifth_is_kept_aside_and_tracked_by_base_and_domain(learn_nothing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapt.yaml").write_text("no_key: of a run that is not asked for")
    results, printed = learn_nothing(4)
    (kept,) = results["kept_aside"]
    assert kept["video"] == "v3" and kept["own"] == kept["base"] == results["before"]["eval_J&F"]
    assert not results["trained_on"]
    assert kept["experts_of"] in ("base", "soft") and results["after"].keys() == results["before"].keys()
    assert Image.open(tmp_path / "out" / "adaptation.png").width > 400
    assert "Warning: soft is no better than the base on the videos that were kept aside" in printed
    assert results["gate_videos"] == sum(results["left_out"].values()) == 4
    known = results["left_out"].get("soft", 0)
    assert f"Left out in turn, {known} of 4 were known" in printed
    assert (
        f"refuse {(4 - known + 0.5) / 5:.0%} or fewer of your own further videos: give more videos, or name" in printed
    )


def test_of_too_few_to_keep_one_aside_those_that_were_trained_on_are_tracked(learn_nothing, tmp_path):
    results, printed = learn_nothing(2)
    assert [one["video"] for one in results["trained_on"]] == ["v0", "v1"] and not results["kept_aside"]
    assert all(one["own"] == one["base"] for one in results["trained_on"])
    assert "what is won on videos that were not trained on is not known" in printed
    assert "Warning: soft is no better than the base on the videos that were trained on" in printed
    assert "Expect the gate to refuse" in printed  # and no J&F
    assert Image.open(tmp_path / "out" / "adaptation.png").width > 400


def test_what_is_tracked_after_the_training_is_read_before(base, tmp_path, monkeypatch):
    data, train = write_folder(tmp_path / "data", 1), Mock()
    (data / "v0" / "masks" / "2.png").unlink()
    (data / "v0" / "frames" / "2.png").write_bytes(b"damaged")
    monkeypatch.setattr("samoe_hf.training.trainer.SamoeTrainer.train", train)
    with pytest.raises(ValueError, match=r"frames/2\.png: not a readable image"):
        run_command([str(base), "--domain", "d", "--dataset", str(data), "--output", str(tmp_path / "o"), *FOLDER_RUN])
    assert not train.called


def test_videos_that_cannot_be_read_are_left_out_if_so_asked(base, tmp_path, monkeypatch):
    data, out = write_folder(tmp_path / "data", 5), tmp_path / "out"
    for file in ("v0/frames/0.png", "v1/frames/2.png", "v4/masks/1.png"):
        (data / file).write_bytes(b"damaged")
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [str(base), "--domain", "d", "--dataset", str(data), "--output", "~/out", *FOLDER_RUN]
    run_command([*words, "--on_error", "skip", "--fit", "4GB", "--use_cpu", "true"])
    results = json.loads((out / "adaptation.json").read_text())
    assert [one["video"] for one in results["kept_aside"]] == ["v3"] and results["gate_videos"] == 2


@pytest.mark.parametrize(
    ("count", "options", "kept", "trained"),
    [(2, [], 0, 2), (3, [], 1, 2), (10, [], 2, 8), (4, ["--eval-fraction", "0.5"], 2, 2),
     (4, ["--eval_data", "{kind: synthetic, num_videos: 3, num_frames: 2}"], 0, 4)],
)  # fmt: skip
def test_videos_are_kept_aside_from_three_on(base, tmp_path, count, options, kept, trained):
    data = write_folder(tmp_path / "data", count)
    folders = ["--model_name_or_path", str(base), "--output_dir", str(tmp_path / "out"), "--train_data", str(data)]
    trainer = build_trainer(["adapt", *folders, *FOLDER_RUN, "--domain", "x", *options])
    (clips,) = trainer.train_dataset.datasets.values()
    ids = {video.video_id for video in trainer.kept_aside}, {video.video_id for video in clips.videos}
    assert (len(ids[0]), len(ids[1]), ids[0] & ids[1]) == (kept, trained, set())
    assert len(trainer.eval_dataset or []) == (3 if "--eval_data" in options else kept)


def test_what_the_gate_refuses_is_estimated_by_leaving_videos_out(first):
    folder, _ = first
    model = SamoeModel.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.domain_gate.state_dict().items()}
    torch.manual_seed(0)
    features = torch.randn(40, model.domain_gate.num_features)
    features[-4:] += 50
    numbers = torch.arange(10).repeat_interleave(4)
    assert gate_fitting.leave_out(model, "soft", features, numbers) == {"soft": 9, "base": 1}
    assert Adaptation("soft", 10, {}, left_out={"soft": 9, "base": 1}).refused == 1.5 / 11
    assert gate_fitting.leave_out(model, "soft", features[:4], numbers[:4]) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.domain_gate.state_dict().items())
    said = Adaptation("soft", 1, {}).describe()
    assert "give more, or name the domain where you track (`--domain soft`)" in said
    assert said.startswith("What is won is not known: no video has masks on several frames")
    said = Adaptation("soft", 4, {}, left_out={"soft": 1, "hard": 3}).describe()
    assert "1 of 4 were known by the others (3 were taken for hard). Expect the gate to refuse, or take" in said


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_change_no_other_domain(base, tmp_path, mode):
    model = SamoeModel.from_pretrained(base)
    for name in "ab":
        add_domain(model, name, num_experts=2)
        for _, experts in domain_modules(model, name):
            torch.nn.init.normal_(experts.lora_B, std=0.1)
    model.save_pretrained(tmp_path / "model")
    run_two("train_domain.py", mode, tmp_path / "model", tmp_path / "trained.pt")
    before, after = model.state_dict(), torch.load(tmp_path / "trained.pt", weights_only=True)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and all(".domain_b." in name for name in changed)


@pytest.mark.slow
def test_of_two_processes_one_says_what_was_done(base, tmp_path):
    data = write_folder(tmp_path / "data", 2)
    words = [base, "--domain", "soft", "--dataset", data, "--output", tmp_path / "out", "--lora_rank", "auto"]
    command = [*LAUNCH, "-m", "samoe_hf", "adapt", *map(str, words), *FOLDER_RUN, "--use_cpu"]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line in ("The experts may have 4MB", "The gate knows soft", "No video was kept aside", "Written: the model"):
        assert result.stdout.count(line) == 1, result.stdout


def test_what_is_wrong_is_said_before_anything_is_written(base, tmp_path):
    run = str(write_run(tmp_path, "blobs"))
    words = [str(base), "--domain", "x", "--dataset", run, "--output"]
    for named, other in (("--output_dir", "--output"), ("--model-name-or-path", "MODEL"), ("--domain_like", "--like")):
        with pytest.raises(ValueError, match=f"`{named}` is given by `{other}` here"):
            run_command([*words, str(tmp_path / "out"), f"{named}=y"])
    for dataset, message in (
        ("{kind: files, root: a", "`--dataset` {kind: files, root: a is not YAML"),
        ("finetune_davi", "`--dataset` finetune_davi is neither a folder here nor a run; did you mean"),
        ("{kind: davi}", r"train_data\[0\]: unknown kind of dataset 'davi'"),
    ):
        with pytest.raises(ValueError, match=message):
            run_command([*words[:4], dataset, "--output", str(tmp_path / "out")])
    for options, message in (
        (["--trainable", "all"], "`trainable` must be experts"),
        (["--eval_fraction", "0.6"], r"`eval_fraction` must be at most 0.5, got 0.6"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt(base, "x", [run, *options], tmp_path / "out")
    with pytest.raises(ValueError, match=r"`--output` .* holds the base model"):
        run_command([*words, str(base)])
    assert not (tmp_path / "out").exists()


def test_of_few_videos_more_frames_are_read(first, monkeypatch):
    folder, _ = first
    model, numbers = SamoeModel.from_pretrained(folder), []

    def count(model, processor, video, frames):
        numbers.append(len(frames))
        return torch.randn(len(frames), model.domain_gate.num_features)

    monkeypatch.setattr(gate_fitting, "frame_features", count)
    monkeypatch.setattr(gate_fitting, "MAX_VIDEOS", 100)
    video = SyntheticVideos(1, 40, (64, 64), domain="stripes")[0]
    for num_videos in (2, 20, 1000):
        fit_gate(model, None, "soft", [video] * num_videos, show_progress_bar=False)
    assert [max(numbers[:2]), max(numbers[2:22]), max(numbers[22:])] == [32, 12, 4] and len(numbers) == 122


@pytest.mark.parametrize(
    ("options", "name"), [pytest.param([], "former", marks=pytest.mark.slow), (["--former", "earlier"], "earlier")]
)
def test_experts_of_no_domain_become_the_former_one(base, tmp_path, capsys, options, name):
    model = SamoeModel.from_pretrained(base)
    with torch.no_grad():
        for _, module in expert_modules(model):
            module.lora_B.normal_(std=0.01)
    model.save_pretrained(tmp_path / "old", processor=build_processor(model.config))
    run = str(write_run(tmp_path, "blobs"))
    run_command(
        [str(tmp_path / "old"), "--domain", "new", "--dataset", run, "--output", str(tmp_path / "out"), *options]
    )
    assert f"The model's experts, which belonged to no domain, are now those of '{name}'." in capsys.readouterr().out
    adapted = SamoeModel.from_pretrained(tmp_path / "out")
    assert adapted.config.domain_names == [name, "new"]
    for (_, old), (_, kept) in zip(expert_modules(model), domain_modules(adapted, name), strict=True):
        assert torch.equal(old.lora_B, kept.lora_B)
    with pytest.raises(ValueError, match="`former` must be another name than `domain` 'former'"):
        adapt(tmp_path / "old", "former", [run], tmp_path / "none")
