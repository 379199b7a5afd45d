"""The methods that a study compares: what of a model each trains, and how models of several LoRAs are made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import OSFConfig, inject_adapter_in_model
from peft.tuners.osf.layer import OSFLayer
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from samoe_hf.data import ClipDataset
from samoe_hf.data.schema import Video
from samoe_hf.data.transforms import transforms_from_options
from samoe_hf.evaluation.evaluate import evaluate_videos
from samoe_hf.evaluation.metrics import summarize
from samoe_hf.model.domain_choice import AUTO
from samoe_hf.model.expert_layer import is_expert_parameter, matching_linear_names, replace_module
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.model.prompt_recipe import PromptRecipe
from samoe_hf.surgery.experts import freeze_experts, grow_experts, remove_experts, replace_experts
from samoe_hf.training.arguments import SamoeTrainingArguments
from samoe_hf.training.trainer import SamoeTrainer
from study_plan import StudyDomain, StudyPlan

# All of the base's parameters, without experts, which are without effect in the base.
BASE_PARAMETERS = r"(?!.*(lora_|router)).*"
MEMORY_PARAMETERS = (
    r"(?!.*(lora_|router))(memory_|object_pointer_proj|mask_downsample|temporal_positional_encoding|occlusion_spatial"
    r"|no_memory|no_object_pointer).*"
)
EXPERTS_PER_TOKEN = 2
WARMUP_STEPS = 30
ROUTER_AUX_LOSS_COEF = 0.01
SUBSPACES = r".*osf_svd_params.*"


@dataclass(frozen=True)
class Method:
    """A method that trains one model on domain after domain.

    Attributes:
        label: for reports.
        trainable: set of parameters, see [`SamoeModel.set_trainable`].
        prepare: gets the model, the study and how many domains it has learned, before it is trained on the next; what
            it returns is called afterwards.
        trains_base: whether the base's own parameters are trained, at `full_learning_rate`.
    """

    label: str
    trainable: str
    prepare: Callable[[SamoeModel, StudyPlan, int], Callable[[], None] | None]
    trains_base: bool = False


def lora_settings(plan: StudyPlan, num_domains: int = 1) -> dict[str, Any]:
    """Settings of the experts that are one LoRA, as large as those of so many domains."""
    return {
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "lora_rank": plan.lora_rank * num_domains,
        "lora_alpha": plan.lora_alpha,
        "lora_dropout": 0.0,
        "expert_modules": plan.expert_modules,
        "exclude_modules": plan.exclude_modules,
    }


def expert_settings(plan: StudyPlan, num_domains: int) -> dict[str, Any]:
    """Settings of a mixture of experts, as large as the LoRAs of so many domains."""
    num_experts, rank = plan.experts_per_domain * num_domains, plan.lora_rank // plan.experts_per_domain
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": min(EXPERTS_PER_TOKEN, num_experts),
        "lora_rank": rank,
        "lora_alpha": plan.lora_alpha * rank / plan.lora_rank,
        "lora_dropout": 0.0,
        "expert_modules": plan.expert_modules,
        "exclude_modules": plan.exclude_modules,
    }


def _leave(model: SamoeModel, plan: StudyPlan, num_learned: int) -> None:
    """The base's parameters are trained as they are."""


def _one_lora(model: SamoeModel, plan: StudyPlan, num_learned: int) -> None:
    if num_learned == 0:
        replace_experts(model, **lora_settings(plan, plan.num_domains))


def _one_mixture(model: SamoeModel, plan: StudyPlan, num_learned: int) -> None:
    if num_learned == 0:
        replace_experts(model, **expert_settings(plan, plan.num_domains))


def _balanced_mixture(model: SamoeModel, plan: StudyPlan, num_learned: int) -> None:
    _one_mixture(model, plan, num_learned)
    model.config.router_aux_loss_coef = ROUTER_AUX_LOSS_COEF


def _frozen_experts(model: SamoeModel, plan: StudyPlan, num_learned: int) -> None:
    if num_learned == 0:
        replace_experts(model, **expert_settings(plan, 1))
        return
    old = range(model.config.num_experts)
    grow_experts(model, plan.experts_per_domain)
    freeze_experts(model, old)


def _orthogonal_subspaces(model: SamoeModel, plan: StudyPlan, num_learned: int) -> Callable[[], None]:
    """PEFT's OSF: of each weight, the strongest directions are frozen, more of them with each domain, and what is
    trained stays orthogonal to them. Afterwards the weights hold what was learned."""
    experts = {name: tensor.clone() for name, tensor in model.state_dict().items() if is_expert_parameter(name)}
    remove_experts(model)  # without effect, and in the way of PEFT
    layers = matching_linear_names(model, plan.expert_modules, plan.exclude_modules)
    frozen = (num_learned + 1) / (plan.num_domains + 1)
    inject_adapter_in_model(OSFConfig(target_modules=layers, effective_rank=frozen), model)
    del model.peft_config  # never saved as an adapter

    def merge() -> None:
        for name in layers:
            layer = model.get_submodule(name)
            assert isinstance(layer, OSFLayer)
            layer.merge()
            linear = layer.get_base_layer()
            assert isinstance(linear, nn.Linear)
            replace_module(model, name, linear)
        replace_experts(model)
        model.load_state_dict(experts, strict=False)

    return merge


# Trained on domain after domain, in this order in reports.
SEQUENTIAL = {
    "full": Method("full fine-tuning", BASE_PARAMETERS, _leave, trains_base=True),
    "memory": Method("memory modules alone", MEMORY_PARAMETERS, _leave, trains_base=True),
    "lora": Method("one LoRA", "experts", _one_lora),
    "moe": Method("SAM2-MoE", "experts", _one_mixture),
    "moe_balanced": Method("SAM2-MoE, balanced", "experts", _balanced_mixture),
    "frozen_experts": Method("old experts frozen, router trained", "experts", _frozen_experts),
    "osf": Method("orthogonal subspaces (OSF)", SUBSPACES, _orthogonal_subspaces, trains_base=True),
}
LABELS = {
    "base": "base alone",
    **{name: method.label for name, method in SEQUENTIAL.items()},
    "token_routers": "own LoRAs, computed token routers",
    "prototypes": "own LoRAs, nearest prototype",
    "samcl": "own LoRAs, SAMCL's selector",
    "domains": "domains with the gate",
    "auto": "domains with the gate, ranks chosen",
    "own_lora": "own LoRAs from nothing, the right one given",
}


# --- Training


class _StepCallback(TrainerCallback):
    def __init__(self, on_step: Callable[[int], None]):
        self.on_step = on_step

    def on_step_end(self, args, state, control, **kwargs):
        self.on_step(state.global_step)


def train(
    model: SamoeModel,
    videos: Sequence[Video],
    domain: StudyDomain,
    plan: StudyPlan,
    *,
    trainable: str,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int], None],
    experts_of: str | None = None,
) -> None:
    """Trains a model on clips of one domain, from masks on the first frame.

    Args:
        experts_of: of a model with domains, the one whose experts are trained.
        on_step: gets the number of each step that is done.
    """
    processor = build_processor(model.config)
    clips = ClipDataset(
        videos,
        processor,
        seed=seed,
        clips_per_video=1 + plan.batch_size * domain.steps // len(videos),
        num_frames=plan.num_frames,
        max_objects=plan.max_objects,
        transforms=None if domain.augmentation is None else transforms_from_options(domain.augmentation),
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SamoeTrainingArguments(
            output_dir=folder,
            max_steps=domain.steps,
            per_device_train_batch_size=plan.batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, min(WARMUP_STEPS, domain.steps // 10)),
            trainable=[trainable],
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        recipe = PromptRecipe(point_probability=0.0, max_initial_frames=1)
        trainer = SamoeTrainer(
            model.train(), arguments, recipe, processing_class=processor, train_dataset=clips,
            callbacks=[_StepCallback(on_step)], domain=experts_of,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


# --- Measuring


def score(
    model: SamoeModel, videos: Sequence[Video], domains: str | Sequence[str | None] | None = AUTO
) -> dict[str, float]:
    """J, F and J&F, 0 to 1, over all objects and the frames after the first that shows each.

    Args:
        domains: of a model with domains, whose experts are run; or one for each video.
    """
    processor, results = build_processor(model.config), {}
    each = [domains] * len(videos) if domains is None or isinstance(domains, str) else domains
    for domain in dict.fromkeys(each):
        own = [video for video, its in zip(videos, each, strict=True) if its == domain]
        results |= evaluate_videos(model, processor, own, show_progress_bar=False, domain=domain)
    summarized = summarize({key: result.scores for key, result in results.items()}, protocol="youtube_vos")
    return {name: summarized[f"{name}_mean"] for name in ("J", "F", "J&F")} | {"num_videos": len(results)}


def added_size(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, int]:
    """Parameters, and bytes, of what a model has beside its base: tensors that the base lacks or that differ."""
    own = [
        tensor
        for name, tensor in tensors.items()
        if name not in base or base[name].shape != tensor.shape or not torch.equal(base[name].cpu(), tensor.cpu())
    ]
    return {"parameters": sum(t.numel() for t in own), "bytes": sum(t.numel() * t.element_size() for t in own)}
