"""The keys of a training run that are this package's own. Imports no PyTorch, so that a help text is there at once."""

# ruff: noqa: RUF009 (`key` makes fields)

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


def key(help: str, default: Any = None, **metadata: str) -> Any:
    """A field with its help text. Each run gets a copy of a list or mapping."""
    metadata = {"help": help, **metadata}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelKeys:
    """Which model is trained. Settings of the experts that are not given are the model's."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = key("Folder, Hub id or original checkpoint, as `from_pretrained` takes it.")
    model_config: str | None = key(
        "YAML of a SamoeConfig, or one of the package's sizes such as model_nano, to start from random weights instead."
    )
    experts: str | None = key("With an original .pt: the file of its experts.")
    config: str | None = key("With an original .pt: its YAML, needed for sizes other than Meta's.")
    ignore_mismatched_sizes: bool = key(
        "New experts take the place of those of another number or rank, or in other layers.", False
    )
    quantization_config: dict | None = key(
        "Hold the frozen base in 8 or 4 bits: values of a transformers' configuration, such as "
        '"{quant_method: bitsandbytes, load_in_4bit: true}", see docs/quantization.md.'
    )
    num_experts: int | None = key("Experts of a layer.")
    num_experts_per_tok: int | None = key("Experts that a token goes to.")
    lora_rank: int | None = key("Rank of an expert.")
    lora_alpha: float | None = key("Experts are scaled by `lora_alpha / lora_rank`.")
    lora_dropout: float | None = key("Dropout of the experts and of the router's input.")
    expert_modules: list[str] | None = key("Layers with experts: names, ends of names, or patterns with *, ? and [ ].")
    exclude_modules: list[str] | None = key("Layers of these that get no experts.")
    router_aux_loss_coef: float | None = key("Weight of the routers' load-balancing loss.")
    recent_memory_pooling: int | None = key("Side of the squares over which the last frame's memory is averaged.")
    older_memory_pooling: int | None = key("The same of the memories of the frames before it.")
    image_size: int | None = key("Height and width that frames are resized to, in place of the model's own.")
    memory_selection: str | None = key("Which memories a frame reads: recent, score or distractor.")
    domain: str | None = key("Train the experts of this domain alone, by the settings above if the model lacks it.")
    former: str = key("With `domain`: the domain that experts of no domain become, as SAM2-MoE's.", "former")
    domain_like: str | None = key("A new domain's experts start as those of this domain of the model.")


@dataclass
class DataKeys:
    """The videos, and how clips are drawn from them."""

    _argument_group_name: ClassVar[str] = "data"

    train_data: list[dict] = key(
        "Datasets: a folder, or the arguments of `load_videos` and `weight`, its share of the clips, such as "
        '"{kind: davis, root: DAVIS}".',
        [],
        metavar="FOLDER|{...}",
    )
    eval_data: list[dict] = key("As train_data; these videos are tracked. none: no others.", [], metavar="FOLDER|{...}")
    eval_fraction: float = key(
        "Where `eval_data` names none: the share of the training videos that is kept aside and tracked instead; one of "
        "three at least.",
        0.0,
    )
    num_frames: int = key("Frames of a clip.", 8)
    stride: int = key("Step between a clip's frames, in annotated frames.", 1)
    max_objects: int = key("Objects of a clip.", 3)
    reverse_probability: float = key("Share of clips that run backward.", 0.5)
    clips_per_video: int = key("Clips drawn of each video in an epoch.", 1)
    augmentation: dict | None = key("Arguments of `training_transforms`; {} for SAM 2's, none for no augmentation.")
    on_error: Literal["raise", "skip"] = key("With a sample that cannot be used: raise, or skip.", "raise")


@dataclass
class TrainingKeys:
    """What is trained at which learning rate, and how; beside the keys of transformers' `TrainingArguments`."""

    _argument_group_name: ClassVar[str] = "training"

    trainable: list[str] = key(
        "Sets of parameters that are trained: experts, adapters, memory, decoder, all or an expression.", ["experts"]
    )
    learning_rates: dict = key(
        'Rates of some of these sets, such as "{decoder: 1.0e-5}"; the others have `learning_rate`.', {}
    )
    save_only_trained: bool = key("Checkpoints hold only what is trained, if the model came from a base.", True)
    encoder_batch_size: int | None = key("Frames encoded at once; all by default.")
    compile_parts: bool = key(
        "Compile the parts of a frame's work, each by itself; `torch_compile` would compile the loop over frames as "
        "one, anew for each number of frames and clicks.",
        False,
    )
    feature_cache: str | None = key("Folder that keeps the frozen image encoder's features of each frame.")
    fit: str | None = key(
        "The GPU's device memory, such as 16GB: chooses batch size, accumulation, checkpointing, encoder batches and "
        "cache, see docs/small_gpus.md."
    )
    overwrite_output_dir: bool = key("Start anew in a folder with another run, whose checkpoints are removed.", False)
