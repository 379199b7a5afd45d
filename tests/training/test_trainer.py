"""SamoeTrainer and its arguments: what it logs and saves, resumption, processes, plain Trainer."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

from helpers.processes import LAUNCH, run_two
from helpers.reference import ROOT, assert_same_tensors
from samoe_hf import SamoeModel
from samoe_hf.data import ClipCollator, ClipDataset, SyntheticVideos
from samoe_hf.model.prompt_recipe import PromptRecipe
from samoe_hf.surgery.domains import rename_domain
from samoe_hf.training.arguments import SamoeTrainingArguments
from samoe_hf.training.trainer import SamoeTrainer, build_trainer


def make_trainer(config: Path, *overrides: object) -> SamoeTrainer:
    return build_trainer([str(config), *map(str, overrides)])


def test_logs_tell_losses_rates_and_routing_by_domain(run_config):
    rates = ["--trainable", "experts", "decoder", "--learning_rates", "{decoder: 1e-5}"]
    trainer = make_trainer(run_config, *rates, "--router_aux_loss_coef", "0.01")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 6
    first = logs[0]
    parts = [first[f"loss_{name}"] for name in ("focal", "dice", "iou", "object_score", "router")]
    total = sum(weight * part for weight, part in zip((20, 1, 1, 1, 0.01), parts, strict=True))
    assert first["loss"] == pytest.approx(total, rel=1e-3)
    assert first["learning_rate/experts"] == pytest.approx(100 * first["learning_rate/decoder"])
    domains = {key.split("/")[1] for entry in logs for key in entry if key.startswith("router_entropy/")}
    assert domains == {"shapes", "blobs"}
    for entry in logs:
        assert entry["learning_rate"] in (entry["learning_rate/experts"], entry["learning_rate/decoder"])
        for domain in domains:
            usage = [entry[key] for key in entry if key.startswith(f"expert_usage/{domain}/")]
            assert usage == [] or sum(usage) == pytest.approx(1, abs=1e-4)
            assert 0 <= entry.get(f"router_entropy/{domain}", 0) <= 1
    by_epoch = make_trainer(run_config, "--logging_strategy", "epoch", "--max_steps", 13, "--overwrite_output_dir")
    by_epoch.train()
    *logs, _ = by_epoch.state.log_history
    assert len(logs) == 2 and all(any("router_entropy/" in key for key in entry) for entry in logs)


def test_evaluation_tracks_videos_and_reports_by_domain(run_config):
    """Each domain's figures are those of the domain alone, those of all are over all objects; also of equal ids."""
    trainer = make_trainer(run_config)
    videos = [dataclasses.replace(video, video_id="same") for video in trainer.eval_dataset]
    assert [video.domain for video in videos] == ["shapes", "blobs"]
    expected = [trainer.evaluate([video])["eval_J"] for video in videos]
    metrics = trainer.evaluate(videos)
    assert trainer.model.training
    assert metrics["eval_J&F"] == pytest.approx((metrics["eval_J"] + metrics["eval_F"]) / 2)
    assert [metrics["eval_shapes_J"], metrics["eval_blobs_J"]] == expected
    counts = [len(video.object_ids) for video in videos]
    assert metrics["eval_J"] == pytest.approx(sum(c * j for c, j in zip(counts, expected, strict=True)) / sum(counts))
    with pytest.raises(ValueError, match="Two videos are called shapes/same"):
        trainer.evaluate([videos[0], videos[0]])


def test_checkpoints_are_small_and_load_as_models(run_config, model_folder, tmp_path):
    saving = ["--max_steps", "3", "--save_steps", "1", "--save_total_limit", "2", "--logging_strategy", "no"]
    trainer = make_trainer(run_config, "--trainable", "experts", "decoder", *saving)
    (tmp_path / "out" / "checkpoint-mine").mkdir(parents=True)
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-mine"] and trainer.args.save_total_limit == 2
    folder = tmp_path / "out" / "checkpoint-3"
    names = set(load_file(folder / "model.safetensors"))
    assert names == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    config = json.loads((folder / "config.json").read_text())
    assert config["base_model"]["name_or_path"] == str(model_folder)
    for load in (SamoeModel.from_pretrained, AutoModel.from_pretrained):
        loaded, info = load(folder, output_loading_info=True)
        assert type(loaded) is SamoeModel and not any(info.values())
        assert_same_tensors(loaded, trainer.model)
    assert loaded.origin.source == trainer.model.origin.source


@pytest.mark.parametrize("domain", [[], ["--domain", "new"]])
def test_the_best_checkpoint_is_loaded_at_the_end(run_config, domain):
    trainer = make_trainer(
        run_config, *domain,
        "--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "True", "--save_steps", "1",
        "--metric_for_best_model", "J&F", "--greater_is_better", "True", "--max_steps", "3",
    )  # fmt: skip
    trainer.train()
    history = [entry["eval_J&F"] for entry in trainer.state.log_history if "eval_J&F" in entry]
    assert len(history) == 3 and trainer.state.best_metric == max(history)
    assert trainer.evaluate()["eval_J&F"] == pytest.approx(max(history), abs=1e-6)


def test_a_schedule_by_evaluation_goes_by_j_and_f_which_is_to_rise(run_config, monkeypatch):
    scores = iter([0.1, 0.2, 0.3, 0.2])
    found = "samoe_hf.training.trainer.summarize"
    names = ["J_mean", "F_mean", "J&F_mean"]
    monkeypatch.setattr(found, lambda results, **_: dict.fromkeys(names, next(scores) if len(results) > 1 else 0))
    options = ["--eval_strategy", "steps", "--eval_steps", 1, "--max_steps", 4, "--save_strategy", "no"]
    plateau = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", '{"patience": 0, "factor": 0.5}']
    trainer = make_trainer(run_config, *options, *plateau)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 5e-4, "only at the last one"


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(model_folder, tmp_path):
    results = {}
    for mode in ("one", "ddp", "fsdp"):
        path, launch = tmp_path / f"{mode}.pt", LAUNCH[:1] if mode == "one" else LAUNCH
        run_two("gradients.py", mode, model_folder, path, launch=launch)
        results[mode] = torch.load(path, weights_only=True)
    one = results["one"]
    for mode in ("ddp", "fsdp"):
        assert results[mode].keys() == one.keys()
        assert torch.equal(results[mode].pop("masks"), one["masks"])
        for name, gradient in results[mode].items():
            assert (one[name] - gradient).norm() <= 1e-5 * one[name].norm() + 1e-9, name


@pytest.fixture
def clips(model_folder):
    """Clips that differ in the number of objects."""
    clips = ClipDataset(SyntheticVideos(4, 3, (64, 64)), AutoProcessor.from_pretrained(model_folder), num_frames=3)
    assert len({len(clips[i]["labels"]) for i in range(4)}) > 1
    return clips


def plain_trainer(model, clips, folder, **options):
    """A Trainer of transformers."""
    arguments = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=2, per_device_eval_batch_size=1, report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=clips, eval_dataset=clips, data_collator=ClipCollator(), **options)


def test_plain_trainer_trains_and_evaluates(model_folder, clips, tmp_path):
    model = SamoeModel.from_pretrained(model_folder)
    trainer = plain_trainer(model, clips, tmp_path)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model()
    reloaded = SamoeModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in model.state_dict().items())


def test_plain_trainer_refuses_to_go_on_without_what_lies_in_other_files(model_folder, clips, tmp_path):
    model = SamoeModel.from_pretrained(model_folder)
    rename_domain(model, None, "first")
    model.set_trainable("experts", "decoder")
    plain_trainer(model, clips, tmp_path).train()
    again = plain_trainer(model, clips, tmp_path)
    with pytest.raises(ValueError, match=r"`state_dict` has all tensors but .*domain_first"):
        again.train(resume_from_checkpoint=True)
    model.requires_grad_(False).load_state_dict(
        load_file(tmp_path / "checkpoint-1" / "model.safetensors"), strict=False
    )


def test_one_processor_prepares_clips_and_evaluates(run_config, model_folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(model_folder, own)
    processor = AutoProcessor.from_pretrained(own)
    processor.video_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(own)
    for has_processor in (True, False):
        trainer = build_trainer([str(run_config), "--model_name_or_path", str(own)])
        assert (list(trainer.processor.video_processor.image_mean) == [0.1, 0.2, 0.3]) == has_processor
        for clips in trainer.train_dataset.datasets.values():
            assert clips.sampler.processor is trainer.processor
        (own / "processor_config.json").unlink(missing_ok=True)


def test_one_seed_gives_the_same_tensors(run_config, tmp_path):
    """Whatever was drawn before: initial weights, and fresh experts on a base."""
    from_nothing = ["--model_config", str(ROOT / "configs" / "model_nano.yaml")]
    lines = run_config.read_text().splitlines()
    blank = tmp_path / "blank.yaml"
    blank.write_text("\n".join(line for line in lines if not line.startswith("model_name_or_path")))
    new_experts = [str(run_config), "--expert_modules", "qkv", "q_proj", "k_proj", "v_proj", "o_proj"]
    for arguments in ([str(blank), *from_nothing], new_experts):
        states = []
        for other_draws in (1, 2):
            torch.manual_seed(other_draws)
            trainer = build_trainer([*arguments, "--max_steps", "1", "--num_frames", "2", "--save_strategy", "no"])
            if arguments is new_experts:
                trainer.train()
            states.append(trainer.model.state_dict())
        assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


def accumulated_gradients(trainer_class, arguments_class, model_folder, folder, batch_size, **options):
    """Gradients of a step over four clips with 1 to 3 objects, `batch_size` at a time, and the logged loss."""
    # In float64 and without dropout, where only the way of averaging makes a difference.
    model = SamoeModel.from_pretrained(model_folder, dtype=torch.float64)
    model.config.router_aux_loss_coef = 0.1
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_p"):
            module.dropout_p = 0.0
    processor = AutoProcessor.from_pretrained(model_folder)
    dataset = ClipDataset(SyntheticVideos(8, 3, (64, 64), seed=0), processor, num_frames=3)
    by_count = {}
    for clip in (dataset[i] for i in range(8)):
        by_count.setdefault(len(clip["labels"]), []).append(clip)
    assert len(by_count) > 1
    clips = [clip for group in by_count.values() for clip in group[:2]][:4]
    clips = [{**clip, "pixel_values": clip["pixel_values"].double(), "domain": str(i)} for i, clip in enumerate(clips)]
    arguments = arguments_class(
        output_dir=folder, max_steps=1, per_device_train_batch_size=batch_size, report_to="none", disable_tqdm=True,
        gradient_accumulation_steps=4 // batch_size, max_grad_norm=0.0, save_strategy="no", logging_steps=1,
        use_cpu=True,
    )  # fmt: skip
    gradients = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer = trainer_class(model, arguments, train_dataset=clips, callbacks=[Keep()], **options)
    trainer.train()
    return gradients, trainer.state.log_history[0]


@pytest.mark.parametrize("kind", ["SamoeTrainer", pytest.param("Trainer", marks=pytest.mark.slow)])
def test_accumulated_gradients_are_those_of_the_big_batch(kind, model_folder, tmp_path):
    mask = PromptRecipe(point_probability=0, max_initial_frames=1, max_corrected_frames=0)
    kinds = {
        "SamoeTrainer": (SamoeTrainer, SamoeTrainingArguments, {"recipe": mask}),
        "Trainer": (Trainer, TrainingArguments, {"data_collator": ClipCollator()}),
    }
    trainer, arguments, options = kinds[kind]
    expected, whole_log = accumulated_gradients(trainer, arguments, model_folder, tmp_path, 4, **options)
    assert expected
    for batch_size in (2,) if kind == "SamoeTrainer" else (2, 1):
        found, log = accumulated_gradients(trainer, arguments, model_folder, tmp_path, batch_size, **options)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name
        names = [name for name in whole_log if name.startswith(("loss", "router", "expert"))]
        assert kind == "Trainer" or len(names) > 6
        for name in names:
            assert log[name] == pytest.approx(whole_log[name], rel=1e-4, abs=1e-5), name


def test_trainers_own_evaluation_shows_which_objects_are_absent(model_folder, clips, tmp_path):
    """Trainer pads the labels of batches with different numbers of objects with -100, as the collator does."""
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.label_ids)
        return {}

    model = SamoeModel.from_pretrained(model_folder)
    rename_domain(model, None, "new")  # a name is no tensor that Trainer could gather
    plain_trainer(model, clips, tmp_path, compute_metrics=compute_metrics).evaluate()
    (labels,) = seen
    for i, label in enumerate(labels):
        expected = clips[i]["labels"].numpy()
        assert (label[len(expected) :] == -100).all() and (label[: len(expected)] == expected).all()


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["all", "memory"])
def test_two_processes_recompute_frames_and_log_the_loss_of_both(run_config, tmp_path, trainable):
    """Which parameters a clip uses depends on its prompts, so that unused ones must be found."""
    options = ["--gradient_checkpointing", "--trainable", trainable, "--max_steps", "2", "--logging_steps", "2",
               "--save_strategy", "no", "--use_cpu"]  # fmt: skip
    run_two("train_and_log.py", tmp_path / "log.json", run_config, *options)
    log = json.loads((tmp_path / "log.json").read_text())
    weights = {"focal": 20, "dice": 1, "iou": 1, "object_score": 1}
    assert log["loss"] == pytest.approx(sum(w * log[f"loss_{name}"] for name, w in weights.items()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["load_in_8bit: true", "load_in_4bit: true, bnb_4bit_quant_type: nf4"])
def test_experts_are_trained_over_a_quantized_base(run_config, tmp_path, options):
    pytest.importorskip("bitsandbytes")
    config = f"{{quant_method: bitsandbytes, {options}}}"
    overrides = ["--quantization_config", config, "--max_steps", "2", "--save_steps", "1", "--point_probability", "0"]
    trainer = make_trainer(run_config, *overrides, "--eval_strategy", "epoch")
    assert trainer.model.origin.quantized
    trainer.train()
    loaded = SamoeModel.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert not loaded.origin.quantized
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    resumed = make_trainer(run_config, *overrides, "--resume_from_checkpoint", "last")
    resumed.train(resume_from_checkpoint="last")
    assert resumed.state.global_step == 2
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, resumed.model.get_parameter(name)), name
            assert torch.equal(parameter, loaded.get_parameter(name)), name
    with pytest.raises(ValueError, match="`save_only_trained` must be true"):
        make_trainer(run_config, *overrides, "--save_only_trained", "false", "--overwrite_output_dir", "true")
    with pytest.raises(ValueError, match="goes with `model_name_or_path`"):
        make_trainer(run_config, *overrides, "--model_config", "model_nano", "--output_dir", str(tmp_path / "other"))


def test_what_a_trainer_is_given_stays_as_it_is(model_folder, clips, tmp_path):
    model = SamoeModel.from_pretrained(model_folder)
    options = {"fit": "8GB", "trainable": ["decoder"], "report_to": "none", "use_cpu": True, "hub_token": "hf_a"}
    arguments, processor = SamoeTrainingArguments(tmp_path, **options), clips.sampler.processor
    before = arguments.to_dict()
    trainer = SamoeTrainer(model, arguments, processing_class=processor, train_dataset=clips)
    assert trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps == 8
    assert arguments.to_dict() == before and trainer.args.hub_token == "hf_a"
    assert trainer.train_dataset is clips and trainer.processor is processor


def test_what_was_trainable_and_is_not_trained_is_told(model_folder, clips, tmp_path, caplog):
    model = SamoeModel.from_pretrained(model_folder)
    for trainable in (["experts", "decoder"], ["experts"]):
        model.set_trainable("experts", "decoder")
        arguments = SamoeTrainingArguments(tmp_path, trainable=trainable, report_to="none", use_cpu=True)
        SamoeTrainer(model, arguments, processing_class=clips.sampler.processor, train_dataset=clips)
        told = "the model had trainable are frozen, such as 'mask_decoder." in caplog.text
        assert told == (trainable == ["experts"])
