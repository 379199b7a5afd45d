"""A Trainer for clips that tracks videos while it evaluates."""

import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import ProcessorMixin, Trainer, TrainerCallback, enable_full_determinism, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, TrainOutput, speed_metrics

from samoe_hf.data import ClipCollator
from samoe_hf.data.clip_datasets import as_clips, as_videos
from samoe_hf.errors import InputError
from samoe_hf.evaluation.evaluate import VideoResult, evaluate_videos, results_by_key
from samoe_hf.evaluation.metrics import summarize
from samoe_hf.hub.model_card import CardContent, write_model_card
from samoe_hf.hub.push import check_base_is_public
from samoe_hf.model.adapters import adapter_names, is_adapter_parameter, load_adapter
from samoe_hf.model.clip_routing import router_logits_by_clip
from samoe_hf.model.expert_layer import record_router_logits
from samoe_hf.model.losses import SegmentationLoss
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import build_processor, load_processor
from samoe_hf.model.prompts import PromptRecipe

from .arguments import SamoeTrainingArguments, parse_run
from .card import card_settings, evaluation_results
from .checkpoints import check_output_dir, list_checkpoints, remove_checkpoints, resolve_checkpoint
from .feature_cache import FeatureCache
from .logs import TrainingLogs
from .memory_fit import fit_arguments


class SamoeTrainer(Trainer):
    """A Trainer for clips: SAM 2's prompts and loss, learning rates by set, and tracking of videos as evaluation.

    It logs the parts of the loss, and at each logging step the routers' entropy (1 when all experts get equal
    probability) and how much weight each expert gets, by domain. `evaluate` tracks the videos of `eval_dataset` from
    the masks of the first frame that shows each object, and reports `J`, `F` and `J&F` in all and by domain.

    Args:
        recipe: how prompts are simulated.
        segmentation_loss: its weights and focal parameters.
        processing_class: prepares videos, and is saved with each checkpoint; by default as SAM 2 prepares them.
        domain: of a model with domains, the one whose experts are trained, on all clips. Nothing else is: what other
            domains and the gate build on stays as it is.
        train_dataset: clips, such as [`ClipDataset`] draws. Or what that takes: videos, or a dataset of your own whose
            items are mappings with `frames` and `masks`; then clips of 8 frames are drawn, by the run's seed.
        eval_dataset: videos, or a dataset of your own as above.
        kwargs: as in [`~transformers.Trainer`].
    """

    def __init__(
        self,
        model: SamoeModel,
        args: SamoeTrainingArguments,
        recipe: PromptRecipe | None = None,
        segmentation_loss: SegmentationLoss | None = None,
        processing_class: ProcessorMixin | None = None,
        domain: str | None = None,
        train_dataset: Any = None,
        **kwargs,
    ):
        self.domain = domain
        # Whose experts evaluation runs; "auto" where the gate knows the domain.
        self.eval_domain = domain
        if domain is not None or model.config.domains is not None:
            args.trainable = trainable_of_domain(model, domain, args.trainable)
        chosen = {name for one in args.learning_rates() for name in model.parameter_names(one)}
        if any(p.requires_grad and is_adapter_parameter(n) and n not in chosen for n, p in model.named_parameters()):
            # Adapters of PEFT are trained unless they were frozen.
            args.trainable = [*args.trainable, "adapters"]
        model.set_trainable(*args.learning_rates())
        if model.quantized_layers and not (args.save_only_trained and model.base_model_source):
            raise InputError("`save_only_trained` must be true for a quantized base, which is not saved itself.")
        self.recipe = recipe or PromptRecipe()
        processing_class = processing_class or build_processor(model.config)
        if train_dataset is not None:
            kwargs["train_dataset"] = as_clips(train_dataset, processing_class, args.seed)
        if args.fit is not None:
            chosen = fit_arguments(model, args, self.recipe, kwargs.get("train_dataset"))
            if args.process_index == 0:
                print(chosen)
        model.encoder_batch_size = args.encoder_batch_size
        model.feature_cache = None if args.feature_cache is None else FeatureCache(args.feature_cache)
        if segmentation_loss is not None:
            model.segmentation_loss = segmentation_loss
        if args.compile_parts:
            model.compile_for_tracking()
        # The collator's `domain` is for the logs; Trainer would drop it as an argument that the model does not take.
        args.remove_unused_columns = False
        collator = ClipCollator(keep_domain=True)
        super().__init__(model, args, data_collator=collator, processing_class=processing_class, **kwargs)
        if self.is_fsdp_enabled:
            model.wake_experts()  # whole, before they are sharded
        self._logs = TrainingLogs()
        self._last_logged_step = 0
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(DatasetEpochCallback(self.train_dataset))
        self.add_callback(ProcessorCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """As in the base class.

        Args:
            resume_from_checkpoint: a whole checkpoint; "last" or True for the newest whole one in `output_dir`.

        Raises:
            ValueError: if there is no whole checkpoint to go on from; or if nothing is to be resumed, but `output_dir`
                has checkpoints of another run, and not `overwrite_output_dir`.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args)
        elif list_checkpoints(self.args.output_dir):
            if not self.args.overwrite_output_dir:
                raise InputError(
                    f"`output_dir` {self.args.output_dir} has checkpoints of another run, which would be mixed up with "
                    "this one's. Give another one, `resume_from_checkpoint`, or `overwrite_output_dir`."
                )
            if self.is_world_process_zero():
                remove_checkpoints(self.args.output_dir)
        # Trainer aligns special tokens of each processor's tokenizer before training begins; this one has none.
        self.processing_class = None
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self.processing_class = self.callback_handler.processing_class

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """As in the base class, with simulated prompts; in training, adds to the logs."""
        inputs = {**inputs, "prompts": self.recipe}
        domains = inputs.pop("domain", None) or ["default"] * len(inputs["labels"])
        inputs["domain"] = self.domain
        unwrapped = self.accelerator.unwrap_model(model)
        logs_routing = model.training and self._is_logging_step()
        with record_router_logits(unwrapped) if logs_routing else nullcontext() as calls:
            loss, output = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if logs_routing:
            by_clip = router_logits_by_clip(calls, inputs["object_mask"], [self.domain] * len(domains))
            self._logs.add_routing(unwrapped, by_clip, domains)
        if model.training:
            if not loss.requires_grad:
                raise InputError(
                    f"Nothing that is trained ({', '.join(self.args.trainable)}) had a part in the loss: memory is not "
                    f"read where all {inputs['pixel_values'].shape[1]} frames of a clip are prompted. Raise "
                    "`num_frames`."
                )
            # The base class weights each process's share of the total, so that their mean is the total.
            is_share = num_items_in_batch is not None and self.args.average_tokens_across_devices
            scale = self.accelerator.num_processes if is_share else 1
            self._logs.add_losses({name: scale * part for name, part in output.loss_dict.items()})
        return (loss, output) if return_outputs else loss

    def _is_logging_step(self) -> bool:
        step = self.state.global_step + 1
        if self.args.logging_strategy == IntervalStrategy.NO:
            return False
        if self.args.logging_strategy == IntervalStrategy.EPOCH:
            interval = math.ceil(self.state.max_steps / max(self.state.num_train_epochs, 1))
        else:
            interval = max(int(self.state.logging_steps), 1)
        return step % interval == 0 or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the base class; with the training loss, also its parts, the routing and each set's learning rate."""
        if "loss" in logs:
            logs = logs | self._logs.collect(self.state.global_step - self._last_logged_step)
            self._last_logged_step = self.state.global_step
            if self.optimizer is not None:
                groups = self.optimizer.param_groups
                rates = {f"learning_rate/{group['set']}": group["lr"] for group in groups if "set" in group}
                logs |= rates if len(rates) > 1 else {}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.is_world_process_zero() and folder.exists():
            # Left by a process that was killed while it wrote.
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None:
            decaying = set(self.get_decay_parameter_names(model))
            sets = {name: chosen for chosen in reversed(self._rates) for name in self.model.parameter_names(chosen)}
            groups = defaultdict(list)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups[sets[name.removeprefix("module.")], name in decaying].append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self._rates[chosen],
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                        "set": chosen,
                    }
                    for (chosen, decays), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    @property
    def _rates(self) -> dict[str, float]:
        return self.args.learning_rates()

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Tracks the videos, shared out among the processes, and returns J, F and J&F in all and by domain, 0 to 1."""
        videos = self.eval_dataset if eval_dataset is None else eval_dataset
        if videos is None:
            raise InputError("`eval_dataset` must be given, the videos to track.")
        videos = as_videos(videos)
        videos = videos if isinstance(videos, Sequence) else list(videos)
        indices = list(range(len(videos)))
        start_time = time.time()
        model = self.accelerator.unwrap_model(self.model)
        show = self.is_local_process_zero() and not self.args.disable_tqdm
        # Processes that each hold a shard of the weights must take every step together.
        split = nullcontext(indices) if self.is_fsdp_enabled else PartialState().split_between_processes(indices)
        with split as own:
            results = evaluate_videos(
                model, self.processing_class, Subset(videos, own), show_progress_bar=show, domain=self.eval_domain
            )
            results = list(results.values())
        gathered = results_by_key(results if self.is_fsdp_enabled else gather_object(results)).values()

        def summary(selected: Iterable[VideoResult]) -> dict[str, float]:
            # As YouTube-VOS: an object counts from the frame after the one that it was prompted on.
            summarized = summarize({result.key: result.scores for result in selected}, protocol="youtube_vos")
            return {name: summarized[f"{name}_mean"] for name in ("J", "F", "J&F")}

        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summary(gathered).items()}
        for domain in sorted({result.domain for result in gathered}):
            selected = [result for result in gathered if result.domain == domain]
            metrics |= {f"{metric_key_prefix}_{domain}_{name}": value for name, value in summary(selected).items()}
        metrics |= speed_metrics(metric_key_prefix, start_time, num_samples=len(videos))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(
            output_dir, experts_only=self._saves_only_trained(), state_dict=state_dict, processor=self.processing_class
        )
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _saves_only_trained(self) -> bool:
        return self.args.save_only_trained and self.accelerator.unwrap_model(self.model).base_model_source is not None

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As in the base class, which calls it before anything is pushed.

        Raises:
            ValueError: if what is saved refers to a base model that only this machine has.
        """
        if self._saves_only_trained():
            check_base_is_public(self.accelerator.unwrap_model(self.model))
        super().init_hf_repo(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies the checkpoint's configuration and weights to what it uploads; the model needs these as well.
        if self.is_world_process_zero():
            for code in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(code, self.args.output_dir)
            for name in adapter_names(self.accelerator.unwrap_model(self.model)):
                shutil.copytree(Path(checkpoint_folder, name), Path(self.args.output_dir, name), dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        model_name: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        language: str | None = None,
        dataset: str | list[str] | None = None,
        usage_picture: str | os.PathLike | None = None,
    ) -> None:
        """Writes `README.md` with what the run knows: settings, domains, and the scores of the last evaluation.

        Args:
            model_name, license, tags, language, dataset: as in the base class.
            usage_picture: an image of how often each expert is used.
        """
        if not self.is_world_process_zero():
            return
        content = CardContent(
            eval_results=evaluation_results(self.state.log_history),
            usage_picture=usage_picture,
            training=card_settings(self.args) | {"steps": self.state.global_step},
            domains=list(getattr(self.train_dataset, "datasets", [])),
            datasets=dataset,
            license=license,
            language=language,
            tags=tags,
        )
        model, name = self.accelerator.unwrap_model(self.model), model_name or Path(self.args.output_dir).name
        write_model_card(
            model, self.args.output_dir, self.hub_model_id or name, content, experts_only=self._saves_only_trained()
        )

    def _issue_warnings_after_load(self, load_result) -> None:
        # Checkpoints lack what is not trained.
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        # Adapters lie in folders of their own.
        lacking = {name for name in trainable & set(load_result.missing_keys) if not is_adapter_parameter(name)}
        if lacking or load_result.unexpected_keys:
            odd = sorted(lacking or load_result.unexpected_keys)[0]
            raise InputError(f"The checkpoint does not fit the model: {odd!r} is missing or unexpected.")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_adapters(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_adapters(self.state.best_model_checkpoint)

    def _load_adapters(self, checkpoint: str) -> None:
        model = self.accelerator.unwrap_model(self.model)
        for name in adapter_names(model):
            load_adapter(model, checkpoint, name, {"subfolder": name})


class DatasetEpochCallback(TrainerCallback):
    """Sets the epoch of a dataset, which Trainer does not do with several processes."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


class ProcessorCallback(TrainerCallback):
    """Gives a trainer its processor back when training begins, see `SamoeTrainer.train`."""

    def __init__(self, trainer: SamoeTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, processing_class=None, **kwargs):
        self.trainer.processing_class = processing_class
        self.trainer._last_logged_step = state.global_step


def trainable_of_domain(model: SamoeModel, domain: str | None, trainable: Sequence[str]) -> list[str]:
    """The sets that are trained for a domain: its experts, at the rate that is given for experts.

    Raises:
        ValueError: if the model has no such domain, none is given, or anything else is to be trained.
    """
    names = model.config.domain_names
    if domain not in names:
        raise InputError(
            f"`domain` must be one of the model's ({', '.join(map(repr, names)) or 'none'}), got {domain!r}."
        )
    sets = []
    for text in trainable:
        chosen, equals, rate = text.partition("=")
        if chosen not in ("experts", f"domain:{domain}"):
            raise InputError(
                f"`trainable` must be experts where a domain is trained, since other domains build on the rest, got "
                f"{text!r}."
            )
        sets.append(f"domain:{domain}{equals}{rate}")
    return sets


def build_trainer(arguments: Sequence[str] | None = None) -> SamoeTrainer:
    """The trainer of a run, with its model and data; `arguments` as in [`parse_run`]."""
    model_arguments, data_arguments, recipe, segmentation_loss, training_arguments = parse_run(arguments)
    if training_arguments.feature_cache is not None and data_arguments.augmentation is not None:
        raise InputError("`feature_cache` and `augmentation` do not go together: augmented frames never come again.")
    check_output_dir(training_arguments, model_arguments.model_name_or_path)
    # Before the model is built: new experts, or all weights, are drawn at random.
    seed = enable_full_determinism if training_arguments.full_determinism else set_seed
    seed(training_arguments.seed)
    model = model_arguments.load()
    source = model_arguments.model_name_or_path
    # The same processor prepares the clips and evaluates.
    processor = build_processor(model.config) if source is None else load_processor(source, model)
    return SamoeTrainer(
        model,
        training_arguments,
        recipe,
        segmentation_loss,
        processing_class=processor,
        domain=model_arguments.domain,
        train_dataset=data_arguments.train_dataset(processor, training_arguments.seed),
        eval_dataset=data_arguments.eval_videos() or None,
    )
