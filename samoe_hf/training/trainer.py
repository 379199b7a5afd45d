"""A Trainer for clips that tracks videos while it evaluates."""

import json
import logging
import math
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import Sam2VideoModel, Trainer, TrainerCallback, enable_full_determinism, set_seed
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    IntervalStrategy,
    SaveStrategy,
    TrainOutput,
    has_length,
    speed_metrics,
)

from samoe_hf.data import ClipCollator
from samoe_hf.data.clip_datasets import RepeatedStream, as_clips, as_videos
from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError, input_errors, is_disk_full
from samoe_hf.evaluation.evaluate import evaluate_videos, results_by_key
from samoe_hf.evaluation.metrics import summarize
from samoe_hf.hub.model_card import TRAINING_SETTINGS, CardContent, evaluation_results, write_model_card
from samoe_hf.hub.repository import check_base_is_public
from samoe_hf.inference import load_processor
from samoe_hf.model.adapters import (
    adapter_names,
    check_adapters_can_be_saved,
    is_adapter_parameter,
    load_adapter,
    without_adapters,
)
from samoe_hf.model.base_model import ClipSettings
from samoe_hf.model.domain_files import domain_of_tensor, find_domain_files, split_domains
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.losses import SegmentationLoss
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor, build_processor
from samoe_hf.model.prompt_recipe import PromptRecipe
from samoe_hf.model.weights_check import describe_mismatches, find_mismatches
from samoe_hf.model.weights_io import DOMAINS, sync
from samoe_hf.model.weights_store import StoredTensors
from samoe_hf.one_writer import OneWriter
from samoe_hf.whole_files import whole_file, write_text

from .arguments import SamoeTrainingArguments, parse_run, setting_errors
from .checkpoints import (
    ANOTHER_RUN,
    check_output_dir,
    clear_checkpoints,
    list_checkpoints,
    remove_checkpoint,
    resolve_checkpoint,
    rotate_checkpoints,
)
from .feature_cache import FeatureCache
from .fit import fit_arguments
from .logs import TrainingLogs
from .made_from import FILE as RUN_FILE
from .made_from import check_goes_on, made_from

logger = logging.getLogger(__name__)

# What wrappers put before the names of tensors.
WRAPPERS = re.compile(r"^(_orig_mod\.|module\.|base_model\.model\.)+")
# Arguments of Trainer that have no effect here.
UNUSED = "data_collator compute_loss_func compute_metrics preprocess_logits_for_metrics optimizer_cls_and_kwargs"


class SamoeTrainer(Trainer):
    """A Trainer for clips: SAM 2's prompts and loss, learning rates by set, and tracking of videos as evaluation.

    It logs the parts of the loss, and at each logging step the routers' entropy (1 when all experts get equal
    probability) and how much weight each expert gets, by domain. `evaluate` tracks the videos of `eval_dataset` from
    the masks of the first frame that shows each object, and reports `J`, `F` and `J&F` in all and by domain.

    Args:
        model: what is trained, in place; `args` say which of its parameters, and adapters of PEFT that are not frozen
            are trained as well. It may be wrapped by `torch.compile` or `peft.get_peft_model`; what is saved is a
            SamoeModel with its adapters.
        args: arguments of the run, which stay as they are; `fit` chooses others, which the trainer's `args` have.
        recipe: how prompts are simulated.
        segmentation_loss: its weights and focal parameters; by default the model's own.
        processing_class: prepares videos, and is saved with each checkpoint; by default as SAM 2 prepares them. It is
            the trainer's `processor`.
        domain: of a model with domains, the one whose experts are trained, on all clips. Nothing else is: what other
            domains and the gate build on stays as it is.
        train_dataset: clips, such as [`ClipDataset`] draws. Or what that takes: videos, or a dataset of your own whose
            items are mappings with `frames` and `masks`; then clips of 8 frames are drawn, by the run's seed.
        eval_dataset: videos, or a dataset of your own as above; or several by name.
        kwargs: as in [`~transformers.Trainer`].
    """

    args: SamoeTrainingArguments
    model: SamoeModel

    def __init__(
        self,
        model: SamoeModel | nn.Module | None = None,
        args: SamoeTrainingArguments | None = None,
        recipe: PromptRecipe | None = None,
        segmentation_loss: SegmentationLoss | None = None,
        processing_class: VideoProcessor | None = None,
        domain: str | None = None,
        train_dataset: Any = None,
        **kwargs,
    ):
        if not isinstance(args, SamoeTrainingArguments):
            raise InputError(f"`args` must be SamoeTrainingArguments, not {type(args).__name__}.")
        if unused := [name for name in UNUSED.split() if kwargs.get(name) is not None]:
            raise InputError(
                f"`{unused[0]}` is for transformers.Trainer, which also trains a SamoeModel. A SamoeTrainer collates "
                "clips itself, its loss is `segmentation_loss`, it tracks videos to evaluate, and takes `optimizers`."
            )
        for part in parts_of(kwargs.get("eval_dataset") or []).values():
            as_videos(part)  # refuses what holds no videos
        wrapped, model = model, unwrapped(model)
        self.recipe = recipe or PromptRecipe()
        if not isinstance(self.recipe, PromptRecipe):
            raise InputError(f"`recipe` must be a PromptRecipe, not {type(recipe).__name__}.")
        self.processor = processing_class or build_processor(model.config)
        if not hasattr(self.processor, "video_processor"):
            kind = type(processing_class).__name__
            raise InputError(f"`processing_class` must be a processor, as AutoProcessor loads it, not {kind}.")
        # Whose experts are trained, and whose evaluation runs: "auto" where the gate knows the domain.
        self.domain = self.eval_domain = domain
        # Training videos that are evaluated in place of being trained on, and others that were spared to choose by.
        self.kept_aside: list[Video] = []
        self.spared: list[Video] = []
        self.learning_rates = rates_by_set(model, args, domain)
        if train_dataset is not None:
            train_dataset = as_clips(train_dataset, self.processor, args.seed)
        chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
        model.set_trainable(*self.learning_rates)
        for name, parameter in chosen.items():
            if is_adapter_parameter(name):
                parameter.requires_grad_(True)
        frozen = [name for name, p in chosen.items() if not (p.requires_grad or is_expert_parameter(name))]
        if frozen:
            logger.warning(
                f"`trainable` is {list(args.trainable)}, so {len(frozen)} tensors that the model had trainable are "
                f"frozen, such as {frozen[0]!r}; name their set there to train them."
            )
        if args.fit is not None:
            args = fit_arguments(model, args, self.recipe, train_dataset)
        if model.origin.quantized and not (args.save_only_trained and model.origin.source):
            raise InputError("`save_only_trained` must be true for a quantized base, which is not saved itself.")
        model.clip_settings = ClipSettings(
            segmentation_loss or model.clip_settings.loss,
            None if args.feature_cache is None else FeatureCache(args.feature_cache),
            args.encoder_batch_size,
            model.clip_settings.checkpoint_every_n_frames,
        )
        if args.compile_parts:
            model.compile_for_tracking()
        self.writer = OneWriter(args.folder, "`output_dir`")
        # Trainer is not given the processor, since it aligns special tokens of each processor's tokenizer.
        try:
            with setting_errors():
                super().__init__(wrapped, args, ClipCollator(keep_domain=True), train_dataset, **kwargs)
        except OSError as error:
            if error.filename is None:  # of the Hub
                raise
            raise InputError(f"`output_dir` {args.folder} cannot be written: {error}") from error
        if self.is_fsdp_enabled:
            model.wake_experts()  # whole, before they are sharded
        self.training_logs = TrainingLogs()
        # What else the result depends on, for the checkpoints; and all that it does, once it is known.
        self.depends_on: dict[str, Any] = {}
        self._made_from: dict[str, Any] | None = None
        self._rates: dict[str, float] = {}  # of the last step, by set
        self.resumed_from = ""  # a checkpoint
        self.steps_of_epoch = 1
        self.add_callback(RunCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Trains as [`~transformers.Trainer`] does.

        Args:
            resume_from_checkpoint: a whole checkpoint; "last" or True for the newest whole one in `output_dir`.

        Raises:
            InputError: if there is no whole checkpoint, or it is of another run; if nothing is to be resumed, but
                `output_dir` has checkpoints, and not `overwrite_output_dir`; or if another process writes there.
        """
        folder, self.resumed_from = self.args.folder, ""
        with self.writer:
            if resume_from_checkpoint or self.args.save_strategy != SaveStrategy.NO:
                model = unwrapped(self.model)
                settings = self.learning_rates, self.recipe, model.clip_settings.loss, self.domain
                self._made_from = made_from(model, self.args, *settings, self.train_dataset) | self.depends_on
            if self.is_world_process_zero():
                clear_checkpoints(folder)
            self.accelerator.wait_for_everyone()
            if resume_from_checkpoint:
                self.resumed_from = resolve_checkpoint(resume_from_checkpoint, self.args)
            is_own = self.resumed_from and Path(self.resumed_from).resolve().parent == folder.resolve()
            others = [] if is_own else list_checkpoints(folder)
            if others and not self.args.overwrite_output_dir:
                raise InputError(ANOTHER_RUN.format(folder))
            for sentence in check_goes_on(Path(self.resumed_from), self._made_from or {}) if self.resumed_from else ():
                if self.is_world_process_zero():
                    print(sentence)
            self.accelerator.wait_for_everyone()
            for other in others if self.is_world_process_zero() else ():
                remove_checkpoint(other)
            return super().train(self.resumed_from or None, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer. A dataset without a length starts again where it ends, which is no end of an epoch."""
        given: Any = self.train_dataset
        try:
            if given is not None and not has_length(given):
                self.train_dataset = RepeatedStream(given)
            return super().get_train_dataloader()
        finally:
            self.train_dataset = given

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer sees only after a step that it was the last, also after one that a resumed run had taken already.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch of clips, with simulated prompts; in training, adds to the logs."""
        logs: AbstractContextManager = nullcontext()
        if model.training and self._is_logging_step():
            logs = self.training_logs.recorded_routing(unwrapped(model), inputs["object_mask"], inputs["domain"])
        # In the data, `domain` is what a clip is of; for the model, whose experts are run.
        inputs = {**inputs, "prompts": self.recipe, "domain": self.domain}
        with logs:
            result: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, output = result
        if model.training:
            if not loss.requires_grad:
                raise InputError(
                    f"Nothing that is trained ({', '.join(self.learning_rates)}) had a part in the loss: memory is not "
                    f"read where all {inputs['pixel_values'].shape[1]} frames of a clip are prompted. Raise "
                    "`num_frames`."
                )
            # Trainer weights each process's share of the total, so that their mean is the total.
            is_share = num_items_in_batch is not None and self.args.average_tokens_across_devices
            scale = self.accelerator.num_processes if is_share else 1
            self.training_logs.add_losses({name: scale * part for name, part in output.loss_dict.items()})
        return (loss, output) if return_outputs else loss

    def _is_logging_step(self) -> bool:
        step, strategy = self.state.global_step + 1, self.args.logging_strategy
        by_epoch = step % self.steps_of_epoch == 0 or step == self.state.max_steps
        by_step = step % max(int(self.state.logging_steps), 1) == 0
        is_due = by_epoch if strategy == IntervalStrategy.EPOCH else by_step
        return strategy != IntervalStrategy.NO and (is_due or (step == 1 and self.args.logging_first_step))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs values; with the training loss, also its parts, the routing and each set's learning rate."""
        if "loss" in logs:
            logs = logs | self.training_logs.collect()
            logs |= self._rates if len(self._rates) > 1 else {}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.is_world_process_zero() and folder.exists():
            remove_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        limit = self.args.save_total_limit
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:
            if not is_disk_full(error):
                raise
            if self.is_world_process_zero() and folder.exists():
                remove_checkpoint(folder)
            before = " with `resume_from_checkpoint: last`" if list_checkpoints(self.args.folder) else ""
            raise InputError(
                f"{folder} could not be written, since the disk is full: {error}. What was there is as it was: make "
                f"room, and run the same again{before}."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.is_world_process_zero():
            for path in (folder / TRAINER_STATE_NAME, folder, folder.parent):
                sync(path)
        if self.args.should_save:
            rotate_checkpoints(folder.parent, limit, self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last but the file that says that the checkpoint is whole, after which Trainer would remove older ones.
        super()._save_rng_state(output_dir)
        sync(output_dir, below=True)
        self.args.save_total_limit = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer, in which each set of parameters has its rate."""
        model = model or self.model
        if self.optimizer is None:
            decaying, inner = set(self.get_decay_parameter_names(model)), unwrapped(model)
            parameters = dict(inner.named_parameters())
            rates = {"adapters": self.args.learning_rate, **self.learning_rates}
            sets = {parameters[n]: one for one in reversed(self.learning_rates) for n in inner.parameter_names(one)}
            groups = defaultdict(list)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups[sets.get(parameter, "adapters"), name in decaying].append(parameter)
            if not groups:
                raise InputError(f"`trainable` is {list(self.args.trainable)}, which leaves nothing to train.")
            groups = [
                {"params": found, "lr": rates[chosen], "weight_decay": self.args.weight_decay * decays, "set": chosen}
                for (chosen, decays), found in groups.items()
            ]
            with setting_errors():
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; settings that it lacks or that do not fit are an InputError."""
        with setting_errors():
            return super().create_scheduler(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            raise InputError(error.args[0]) from error

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Tracks the videos, shared out among the processes, and returns J, F and J&F in all and by domain, 0 to 1.

        Of several datasets in a dictionary, each is evaluated by itself, with its name in those of its metrics. One of
        those that the trainer was given is asked for by its name, as from `Trainer`.
        """
        videos = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(videos, str):
            if videos not in (named := parts_of(self.eval_dataset)):
                raise InputError(f"`eval_dataset`: {videos!r} is not a name of the trainer's own ({', '.join(named)}).")
            videos = named[videos]
        if videos is None:
            raise InputError("`eval_dataset` must be given, the videos to track.")
        if (parts := parts_of(videos)).keys() != {""}:
            found = [self.evaluate(part, None, f"{metric_key_prefix}_{name}") for name, part in parts.items()]
            return {name: value for metrics in found for name, value in metrics.items()}
        opened, start_time = as_videos(videos), time.time()
        videos: Any = opened if isinstance(opened, Sequence) else list(opened)
        model, state = unwrapped(self.model), PartialState()
        show = self.is_local_process_zero() and not self.args.disable_tqdm
        # Processes that each hold a shard of the weights must take every step together.
        first, step = (0, 1) if self.is_fsdp_enabled else (state.process_index, state.num_processes)
        own: Any = Subset(videos, range(first, len(videos), step))
        found = evaluate_videos(model, self.processor, own, show_progress_bar=show, domain=self.eval_domain)
        results = list(found.values())
        results = list(results_by_key(results if self.is_fsdp_enabled else gather_object(results)).values())
        groups = {f"{name}_": [r for r in results if r.domain == name] for name in sorted({r.domain for r in results})}
        metrics = {}
        for prefix, group in {"": results, **groups}.items():
            # As YouTube-VOS: an object counts from the frame after the one that it was prompted on.
            summary = summarize({result.key: result.scores for result in group}, protocol="youtube_vos")
            metrics |= {f"{metric_key_prefix}_{prefix}{name}": summary[f"{name}_mean"] for name in ("J", "F", "J&F")}
        metrics |= speed_metrics(metric_key_prefix, start_time, num_samples=len(videos))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = output_dir or self.args.folder
            if state_dict is not None:  # of the wrapped model
                state_dict = {WRAPPERS.sub("", name): tensor for name, tensor in state_dict.items()}
            unwrapped(self.model).save_pretrained(
                folder, experts_only=self._saves_only_trained(), state_dict=state_dict, processor=self.processor
            )
            with whole_file(Path(folder, TRAINING_ARGS_NAME)) as file:
                torch.save(self.args, file)
            if Path(folder) != self.args.folder and self._made_from is not None:
                write_text(Path(folder, RUN_FILE), json.dumps(self._made_from, indent=1))

    def _saves_only_trained(self) -> bool:
        return self.args.save_only_trained and unwrapped(self.model).origin.source is not None

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Makes the repository, before anything is pushed; what is saved must not refer to a base of this machine."""
        if self._saves_only_trained():
            check_base_is_public(unwrapped(self.model))
        super().init_hf_repo(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies the checkpoint's configuration and weights to what it uploads; the model needs these as well.
        if self.is_world_process_zero():
            for code in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(code, self.args.folder)
            self.processor.save_pretrained(self.args.folder)
            for name in adapter_names(unwrapped(self.model)):
                shutil.copytree(Path(checkpoint_folder, name), self.args.folder / name, dirs_exist_ok=True)
            if (domains := Path(checkpoint_folder, DOMAINS)).is_dir():
                shutil.copytree(domains, self.args.folder / DOMAINS, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        model_name: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        language: str | None = None,
        dataset: str | list[str] | None = None,
        usage_picture: str | Path | None = None,
    ) -> None:
        """Writes `README.md` with what the run knows: settings, domains, and the scores of the last evaluation; and
        with `usage_picture`, an image of how often each expert is used."""
        if not self.is_world_process_zero():
            return
        settings = {name: getattr(self.args, name) for name in TRAINING_SETTINGS.split(", ")}
        content = CardContent(
            eval_results=evaluation_results(self.state.log_history),
            usage_picture=usage_picture,
            training=settings | {"steps": self.state.global_step},
            domains=list(getattr(self.train_dataset, "datasets", [])),
            datasets=dataset,
            license=license,
            language=language,
            tags=tags,
        )
        model, name = unwrapped(self.model), self.hub_model_id or model_name or self.args.folder.name
        options = {"experts_only": self._saves_only_trained(), "branch": self.args.hub_revision}
        write_model_card(model, self.args.folder, name, content, **options)

    def _issue_warnings_after_load(self, load_result) -> None:
        # Checkpoints lack what is not trained.
        trainable = {name for name, parameter in unwrapped(self.model).named_parameters() if parameter.requires_grad}
        # Adapters and experts of domains lie in files of their own.
        apart = {name for name in trainable if is_adapter_parameter(name) or domain_of_tensor(name) is not None}
        lacking = (trainable - apart) & set(load_result.missing_keys)
        if lacking or load_result.unexpected_keys:
            odd = sorted(lacking or load_result.unexpected_keys)[0]
            raise InputError(f"The checkpoint does not fit the model: {odd!r} is missing or unexpected.")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # A checkpoint is of the SamoeModel, whatever wraps it.
        model = model if self.is_fsdp_enabled else unwrapped(model or self.model)
        with self._reading_apart(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        wrapped, best = self.model, self.state.best_model_checkpoint
        assert best is not None
        with self._reading_apart(best):
            try:
                if not self.is_fsdp_enabled:
                    self.model = unwrapped(wrapped)
                super()._load_best_model()
            finally:
                self.model = wrapped

    @contextmanager
    def _reading_apart(self, checkpoint: str) -> Iterator[None]:
        """Around what loads a checkpoint's own tensors: then those are loaded that lie in files beside them."""
        model = unwrapped(self.model)
        model.reads_files_beside = True
        try:
            yield
        finally:
            model.reads_files_beside = False
        if not self.is_fsdp_enabled:  # which has all in a file of its own
            self._load_domains(checkpoint)
        for name in adapter_names(model):
            load_adapter(model, checkpoint, name, {"subfolder": name})

    def _load_domains(self, checkpoint: str) -> None:
        model = unwrapped(self.model)
        own = split_domains(without_adapters(model.state_dict()))[1]
        for name, path in find_domain_files(checkpoint, {}, model.config.domains or ()).items():
            stored = StoredTensors([path])
            if problems := describe_mismatches(find_mismatches(stored.headers, own[name])):
                raise InputError(f"{path} does not fit the model: {problems}.")
            model.load_state_dict({name: stored.read(name) for name in stored.headers}, strict=False)


def parts_of(data: Any) -> Mapping[str, Any]:
    """Several datasets by name, or one by none."""
    are_several = isinstance(data, Mapping) and "frames" not in data  # else an item by mistake
    return data if are_several else {"": data}


class RunCallback(TrainerCallback):
    """Tells a trainer of how many steps and at which rates it logs, and its dataset the epoch, in each process; an
    epoch without a step is an `InputError`, before it is saved."""

    def __init__(self, trainer: SamoeTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed run may lie elsewhere than when it was stopped, and its best checkpoint with it.
        best = Path(self.trainer.resumed_from, f"../{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}").resolve()
        if self.trainer.resumed_from and best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.training_logs.num_steps += 1
        # Before the schedule goes on.
        groups: Any = kwargs["optimizer"].param_groups
        self.trainer._rates = {f"learning_rate/{group['set']}": group["lr"] for group in groups if "set" in group}

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step == 0:
            raise InputError(
                "No step was taken: `train_dataset` has no clips, or too few for a batch (`dataloader_drop_last`)."
            )

    def on_epoch_begin(self, args, state, control, **kwargs):
        clips: Any = self.trainer.train_dataset
        if hasattr(clips, "set_epoch"):
            clips.set_epoch(int(state.epoch or 0))
        loader: Any = kwargs["train_dataloader"]
        batches = len(loader) if has_length(loader) else math.inf
        self.trainer.steps_of_epoch = math.ceil(min(batches / args.gradient_accumulation_steps, state.max_steps))
        if getattr(getattr(loader, "base_dataloader", loader), "_iterator", None) is not None:
            # As for workers that start anew, which those of a resumed run do.
            torch.empty((), dtype=torch.int64).random_()


def unwrapped(model: nn.Module | None) -> SamoeModel:
    """The SamoeModel within what `torch.compile`, PEFT or training in several processes wraps around it.

    Raises:
        InputError: if it is another model, or has adapters that cannot be saved with a SamoeModel.
    """
    is_module = isinstance(model, nn.Module)
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False) if is_module else model
    if hasattr(inner, "get_base_model"):  # a PeftModel
        inner = extract_model_from_parallel(inner.get_base_model(), keep_torch_compile=False)
    if not (isinstance(inner, Sam2VideoModel) and hasattr(inner, "clip_settings")):
        raise InputError(
            f"`model` must be a SamoeModel, also within `torch.compile` or PEFT, not {type(model).__name__}; "
            "`model_init` is not supported."
        )
    check_adapters_can_be_saved(inner)  # pyright: ignore[reportArgumentType]  # or remote code's class of that name
    return inner  # pyright: ignore[reportReturnType]


def rates_by_set(model: SamoeModel, args: SamoeTrainingArguments, domain: str | None) -> dict[str, float]:
    """Set of parameters -> learning rate. Of a parameter in several sets the first counts.

    For a domain the only set is its experts.

    Raises:
        InputError: if the model has no such domain, or domains of which none is given; if other than its experts are
            to be trained; or if a set has no parameters.
    """
    rates = {chosen: args.learning_rates.get(chosen, args.learning_rate) for chosen in args.trainable}
    names = model.config.domain_names
    if domain is not None or model.config.domains is not None:
        if domain not in names:
            known = ", ".join(map(repr, names)) or "none"
            raise InputError(f"`domain` must be one of the model's ({known}), got {domain!r}.")
        if others := [chosen for chosen in rates if chosen not in ("experts", f"domain:{domain}")]:
            raise InputError(
                f"`trainable` must be experts where a domain is trained, since other domains build on the rest, got "
                f"{others[0]!r}."
            )
        rates = {f"domain:{domain}": rate for rate in rates.values()}
    for one in rates:
        model.parameter_names(one)  # refuses a set without parameters
    return rates


@input_errors()
def build_trainer(
    arguments: Sequence[str] | None = None, change: Callable[[SamoeModel], None] | None = None, spares: bool = False
) -> SamoeTrainer:
    """The trainer of a run, with its model and data; arguments are as in [`parse_run`].

    `change` changes the model before it is trained. With `spares`, see [`DataArguments.train_dataset`].
    """
    model_arguments, data_arguments, recipe, segmentation_loss, training_arguments = parse_run(arguments)
    if training_arguments.feature_cache is not None and data_arguments.augmentation is not None:
        raise InputError("`feature_cache` and `augmentation` do not go together: augmented frames never come again.")
    check_output_dir(training_arguments, model_arguments.model_name_or_path)
    # Before the model is built: new experts, or all weights, are drawn at random.
    seed = enable_full_determinism if training_arguments.full_determinism else set_seed
    seed(training_arguments.seed)
    model = model_arguments.load()
    if change is not None:
        change(model)
    source = model_arguments.model_name_or_path
    # The same processor prepares the clips and evaluates.
    processor = build_processor(model.config) if source is None else load_processor(source, model)
    trainer = SamoeTrainer(
        model,
        training_arguments,
        recipe,
        segmentation_loss,
        processing_class=processor,
        domain=model_arguments.domain,
        train_dataset=data_arguments.train_dataset(processor, training_arguments.seed, spares),
        eval_dataset=data_arguments.eval_videos() or None,
    )
    trainer.kept_aside, trainer.spared = data_arguments.kept_aside, data_arguments.spared
    return trainer
