"""Training runs: their arguments, from YAML and the command line, and a Trainer that tracks while it evaluates."""

import difflib
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub import EvalResult
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import HfArgumentParser, Sam2VideoProcessor, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import speed_metrics

from samoe_hf.data import ClipCollator, ClipDataset, MixedDataset, load_videos, training_transforms
from samoe_hf.data.registry import read_yaml
from samoe_hf.data.schema import Video
from samoe_hf.evaluation.evaluate import VideoResult, evaluate_videos, results_by_key
from samoe_hf.evaluation.metrics import summarize
from samoe_hf.hub.model_card import write_model_card
from samoe_hf.hub.push import check_base_is_public
from samoe_hf.model.adapters import adapter_names, is_adapter_parameter, load_adapter
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.experts import ExpertLinear, record_router_logits
from samoe_hf.model.losses import SegmentationLoss
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processor import build_processor, load_processor
from samoe_hf.model.prompts import PromptRecipe

from .feature_cache import FeatureCache

# Arguments of a run that its model card tells.
CARD_SETTINGS = (
    "trainable",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "optim",
    "bf16",
    "fp16",
    "seed",
)


@dataclass
class ModelArguments:
    """Which model is trained. Settings of the experts that are not given are the model's."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or original checkpoint, as `from_pretrained` takes it."}
    )
    model_config: str | None = field(
        default=None, metadata={"help": "YAML of a SamoeConfig, to start from random weights instead."}
    )
    experts: str | None = field(default=None, metadata={"help": "Experts of an original checkpoint."})
    original_config: str | None = field(default=None, metadata={"help": "YAML of an original checkpoint."})
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    expert_modules: list[str] | None = None
    router_aux_loss_coef: float | None = None

    def load(self) -> SamoeModel:
        """The model in training mode."""
        if (self.model_name_or_path is None) == (self.model_config is None):
            raise ValueError("Exactly one of `model_name_or_path` and `model_config` must be given.")
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name in SamoeConfig.__dataclass_fields__}
        settings = {name: value for name, value in settings.items() if value is not None}
        if self.model_config is not None:
            return SamoeModel(SamoeConfig(**{**read_yaml(self.model_config), **settings})).train()
        return SamoeModel.from_pretrained(
            self.model_name_or_path, experts=self.experts, original_config=self.original_config, **settings
        ).train()


@dataclass
class DataArguments:
    """The videos, and how clips are drawn from them."""

    train_data: list[dict] = field(
        default_factory=list,
        metadata={"help": "Datasets, each with the arguments of `load_videos`, and `weight`, its share of the clips."},
    )
    eval_data: list[dict] = field(default_factory=list, metadata={"help": "As train_data; these videos are tracked."})
    num_frames: int = field(default=8, metadata={"help": "Frames of a clip."})
    stride: int = field(default=1, metadata={"help": "Step between a clip's frames, in annotated frames."})
    max_objects: int = field(default=3, metadata={"help": "Objects of a clip."})
    reverse_probability: float = field(default=0.5, metadata={"help": "Share of clips that run backward."})
    clips_per_video: int = field(default=1, metadata={"help": "Clips drawn of each video in an epoch."})
    augmentation: dict | None = field(
        default=None, metadata={"help": "Arguments of `training_transforms`; {} for SAM 2's, none for no augmentation."}
    )
    on_error: str = field(default="raise", metadata={"help": "With a sample that cannot be used: raise, or skip."})

    def train_dataset(self, processor: Sam2VideoProcessor, seed: int) -> MixedDataset:
        """All training clips, prepared by `processor`, each dataset by its domain's name."""
        if not self.train_data:
            raise ValueError("`train_data` must name at least one dataset.")
        clips, weights = {}, {}
        for source in self.train_data:
            weight = source.get("weight")
            videos = load_videos(**{name: value for name, value in source.items() if name != "weight"})
            domain = videos[0].domain
            if domain in clips:
                raise ValueError(
                    f"Two datasets of `train_data` have the domain {domain!r}; give each its own `domain`."
                )
            clips[domain] = ClipDataset(
                videos,
                processor,
                seed=seed,
                clips_per_video=self.clips_per_video,
                on_error=self.on_error,
                num_frames=self.num_frames,
                stride=self.stride,
                max_objects=self.max_objects,
                reverse_probability=self.reverse_probability,
                transforms=None if self.augmentation is None else training_transforms(**self.augmentation),
            )
            weights[domain] = len(clips[domain]) if weight is None else weight
        return MixedDataset(clips, weights, seed=seed)

    def eval_videos(self) -> list[Video]:
        return [video for source in self.eval_data for video in load_videos(**source)]


@dataclass
class SamoeTrainingArguments(TrainingArguments):
    """`TrainingArguments`, with what is trained at which learning rate."""

    trainable: list[str] = field(
        default_factory=lambda: ["experts"],
        metadata={
            "help": "What is trained: experts, adapters, memory, decoder, all or an expression; SET=LR: its rate."
        },
    )
    save_only_trained: bool = field(
        default=True, metadata={"help": "Checkpoints hold only what is trained, if the model came from a base."}
    )
    encoder_batch_size: int | None = field(default=None, metadata={"help": "Frames encoded at once; all by default."})
    compile_parts: bool = field(
        default=False,
        metadata={
            "help": "Compile the parts of a frame's work, each by itself; `torch_compile` would compile the loop over "
            "frames as one, anew for each number of frames and clicks."
        },
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps the frozen image encoder's features of each frame."}
    )

    def learning_rates(self) -> dict[str, float]:
        """Set of parameters -> learning rate; of a parameter in several sets the first counts."""
        rates = {}
        for text in self.trainable:
            chosen, _, rate = text.partition("=")
            try:
                rates[chosen] = float(rate) if rate else self.learning_rate
            except ValueError:
                raise ValueError(f"`trainable` must be SET or SET=LR, got {text!r}.") from None
        return rates


class SamoeTrainer(Trainer):
    """A Trainer for clips: SAM 2's prompts and loss, learning rates by set, and tracking of videos as evaluation.

    It logs the parts of the loss, and at each logging step the routers' entropy (1 when all experts get equal
    probability) and how much weight each expert gets, by domain. `evaluate` tracks `eval_dataset`, a list of
    [`Video`], from the masks of the first frame that shows each object, and reports `J`, `F` and `J&F` in all and by
    domain.

    Args:
        processor: of the videos; saved with each checkpoint.
        recipe: how prompts are simulated.
        segmentation_loss: its weights and focal parameters.
        kwargs: as in [`~transformers.Trainer`].
    """

    def __init__(
        self,
        model: SamoeModel,
        args: SamoeTrainingArguments,
        processor: Sam2VideoProcessor,
        recipe: PromptRecipe | None = None,
        segmentation_loss: SegmentationLoss | None = None,
        **kwargs,
    ):
        chosen = {name for one in args.learning_rates() for name in model.parameter_names(one)}
        if any(p.requires_grad and is_adapter_parameter(n) and n not in chosen for n, p in model.named_parameters()):
            # Adapters of PEFT are trained unless they were frozen.
            args.trainable = [*args.trainable, "adapters"]
        model.set_trainable(*args.learning_rates())
        model.encoder_batch_size = args.encoder_batch_size
        model.feature_cache = None if args.feature_cache is None else FeatureCache(args.feature_cache)
        if segmentation_loss is not None:
            model.segmentation_loss = segmentation_loss
        if args.compile_parts:
            model.compile_for_tracking()
        # The collator's `domain` is for the logs; Trainer would drop it as an argument that the model does not take.
        args.remove_unused_columns = False
        self.processor = processor
        super().__init__(model, args, data_collator=ClipCollator(keep_domain=True), **kwargs)
        if self.is_fsdp_enabled:
            model.wake_experts()  # whole, before they are sharded
        self.recipe = recipe or PromptRecipe()
        self._logged: dict[str, list[float | Tensor]] = defaultdict(list)
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(_EpochSetter(self.train_dataset))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs):
        inputs = dict(inputs)
        domains = inputs.pop("domain", None) or ["default"]
        is_logging_step = (self.state.global_step + 1) % max(int(self.state.logging_steps), 1) == 0
        unwrapped = self.accelerator.unwrap_model(model)
        if is_logging_step:
            with record_router_logits(unwrapped) as calls:
                output = model(**inputs, prompts=self.recipe)
            self._log_routing(unwrapped, calls, domains)
        else:
            output = model(**inputs, prompts=self.recipe)
        if model.training and not output.loss.requires_grad:
            raise ValueError(
                f"Nothing that is trained ({', '.join(self.args.trainable)}) had a part in the loss: memory is not "
                f"read where all {inputs['pixel_values'].shape[1]} frames of a clip are prompted. Raise `num_frames`."
            )
        for name, part in output.loss_dict.items():
            self._logged[f"loss_{name}"].append(part)
        return (output.loss, output) if return_outputs else output.loss

    @torch.no_grad()
    def _log_routing(self, model: SamoeModel, calls: dict[str, list[Tensor]], domains: list[str]) -> None:
        """Notes entropy and usage of the routers, averaged over layers, by domain where a call's rows tell objects."""
        for name, logits_of_calls in calls.items():
            module: ExpertLinear = model.get_submodule(name)
            for logits in logits_of_calls:
                by_video = [logits]
                if len(domains) > 1 and logits.shape[0] % len(domains) == 0:
                    by_video = logits.chunk(len(domains))
                names = domains if len(by_video) > 1 else ["+".join(sorted(set(domains)))]
                for domain, of_video in zip(names, by_video, strict=True):
                    probabilities = of_video.float().softmax(dim=-1).clamp(min=1e-12)
                    entropy = -(probabilities * probabilities.log()).sum(dim=-1).mean()
                    self._logged[f"router_entropy/{domain}"].append(
                        entropy.item() / torch.tensor(float(module.num_experts)).log().clamp(min=1e-12).item()
                    )
                    usage = module.gates(of_video.float()).flatten(0, -2).mean(dim=0)
                    for expert, weight in enumerate(usage.tolist()):
                        self._logged[f"expert_usage/{domain}/{expert}"].append(weight)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **{name: sum(map(float, values)) / len(values) for name, values in self._logged.items()}}
            self._logged.clear()
            if self.optimizer is not None:
                groups = self.optimizer.param_groups
                rates = {f"learning_rate/{group['set']}": group["lr"] for group in groups if "set" in group}
                logs |= rates if len(rates) > 1 else {}
        super().log(logs, start_time)

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
        eval_dataset: Sequence[Video] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Tracks the videos, shared out among the processes, and returns J, F and J&F in all and by domain, 0 to 1."""
        videos = self.eval_dataset if eval_dataset is None else eval_dataset
        start_time = time.time()
        rank, world_size = self.args.process_index, self.args.world_size
        # Processes that each hold a shard of the weights must take every step together.
        own = videos if self.is_fsdp_enabled else [videos[i] for i in range(rank, len(videos), world_size)]
        model = self.accelerator.unwrap_model(self.model)
        show = self.is_local_process_zero() and not self.args.disable_tqdm
        results = list(evaluate_videos(model, self.processor, own, show_progress_bar=show).values())
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
            output_dir, experts_only=self._saves_only_trained(), state_dict=state_dict, processor=self.processor
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
            self.processor.save_pretrained(self.args.output_dir)
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
        write_model_card(
            self.accelerator.unwrap_model(self.model),
            self.args.output_dir,
            self.hub_model_id or model_name or Path(self.args.output_dir).name,
            experts_only=self._saves_only_trained(),
            eval_results=self._eval_results(),
            usage_picture=usage_picture,
            training={**{name: getattr(self.args, name) for name in CARD_SETTINGS}, "steps": self.state.global_step},
            domains=list(getattr(self.train_dataset, "datasets", [])),
            datasets=dataset,
            license=license,
            language=language,
            tags=tags,
        )

    def _eval_results(self) -> list[EvalResult]:
        """The scores that `evaluate` logged last."""
        last = next((entry for entry in reversed(self.state.log_history) if "eval_J&F" in entry), {})
        matches = [(re.fullmatch(r"eval_(?:(.+)_)?(J&F|J|F)", key), value) for key, value in last.items()]
        return [
            EvalResult(
                task_type="mask-generation",
                task_name="Video object segmentation, from the mask of the first frame",
                dataset_type=match[1] or "all",
                dataset_name=match[1] or "all domains",
                metric_type=match[2],
                metric_name=match[2],
                metric_value=round(value, 4),
            )
            for match, value in matches
            if match
        ]

    def _issue_warnings_after_load(self, load_result) -> None:
        # Checkpoints lack what is not trained.
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        # Adapters lie in folders of their own.
        lacking = {name for name in trainable & set(load_result.missing_keys) if not is_adapter_parameter(name)}
        if lacking or load_result.unexpected_keys:
            odd = sorted(lacking or load_result.unexpected_keys)[0]
            raise ValueError(f"The checkpoint does not fit the model: {odd!r} is missing or unexpected.")

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


class _EpochSetter(TrainerCallback):
    """Tells the dataset the epoch, which with several processes nobody else does."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


def parse_run(
    arguments: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, PromptRecipe, SegmentationLoss, SamoeTrainingArguments]:
    """Parses `CONFIG [--key value]...`: a YAML of a run, and values that take the place of its.

    Raises:
        ValueError: for a key in the YAML that is not known, naming the nearest that is.
    """
    config, *overrides = sys.argv[1:] if arguments is None else arguments
    kinds = (ModelArguments, DataArguments, PromptRecipe, SegmentationLoss, SamoeTrainingArguments)
    parser = HfArgumentParser(kinds)
    run = read_yaml(config)
    known = [f.name for kind in kinds for f in fields(kind) if f.init]
    for key in run:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{config} has an unknown key {key!r}.{hint}")
    parser.set_defaults(**run)
    return parser.parse_args_into_dataclasses(args=overrides)


def build_trainer(arguments: Sequence[str] | None = None) -> SamoeTrainer:
    """The trainer of a run, with its model and data; `arguments` as in [`parse_run`]."""
    model_arguments, data_arguments, recipe, segmentation_loss, training_arguments = parse_run(arguments)
    if training_arguments.feature_cache is not None and data_arguments.augmentation is not None:
        raise ValueError("`feature_cache` and `augmentation` do not go together: augmented frames never come again.")
    model = model_arguments.load()
    source = model_arguments.model_name_or_path
    # The same processor prepares the clips and evaluates.
    processor = build_processor(model.config) if source is None else load_processor(source, model)
    return SamoeTrainer(
        model,
        training_arguments,
        processor,
        recipe,
        segmentation_loss,
        train_dataset=data_arguments.train_dataset(processor, training_arguments.seed),
        eval_dataset=data_arguments.eval_videos(),
    )
