"""The keys of a training run that are this package's own. Imports no PyTorch, so that a help text is there at once."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal


@dataclass
class ModelKeys:
    """Which model is trained. Settings of the experts that are not given are the model's."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or original checkpoint, as `from_pretrained` takes it."}
    )
    model_config: str | None = field(
        default=None,
        metadata={
            "help": "YAML of a SamoeConfig, or one of the package's sizes such as model_nano, to start from random "
            "weights instead."
        },
    )
    experts: str | None = field(default=None, metadata={"help": "With an original .pt: the file of its experts."})
    config: str | None = field(
        default=None, metadata={"help": "With an original .pt: its YAML, needed for sizes other than Meta's."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "New experts take the place of those of another number or rank, or in other layers."},
    )
    quantization_config: dict | None = field(
        default=None,
        metadata={
            "help": "Hold the frozen base in 8 or 4 bits: values of a transformers' configuration, such as "
            '"{quant_method: bitsandbytes, load_in_4bit: true}", see docs/quantization.md.'
        },
    )
    num_experts: int | None = field(default=None, metadata={"help": "Experts of a layer."})
    num_experts_per_tok: int | None = field(default=None, metadata={"help": "Experts that a token goes to."})
    lora_rank: int | None = field(default=None, metadata={"help": "Rank of an expert."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Experts are scaled by `lora_alpha / lora_rank`."})
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of the experts and of the router's input."}
    )
    expert_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers with experts: an expression for whole names, or ends of names."}
    )
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the routers' load-balancing loss."}
    )
    recent_memory_pooling: int | None = field(
        default=None, metadata={"help": "Side of the squares over which the last frame's memory is averaged."}
    )
    older_memory_pooling: int | None = field(
        default=None, metadata={"help": "The same of the memories of the frames before it."}
    )
    domain: str | None = field(
        default=None,
        metadata={"help": "Train the experts of this domain alone, by the settings above if the model lacks it."},
    )
    domain_like: str | None = field(
        default=None, metadata={"help": "A new domain's experts start as those of this domain of the model."}
    )


@dataclass
class DataKeys:
    """The videos, and how clips are drawn from them."""

    _argument_group_name: ClassVar[str] = "data"

    train_data: list[dict] = field(
        default_factory=list,
        metadata={
            "help": "Datasets: a folder, or the arguments of `load_videos` and `weight`, its share of the clips, such "
            'as "{kind: davis, root: DAVIS}".',
            "metavar": "FOLDER|{...}",
        },
    )
    eval_data: list[dict] = field(
        default_factory=list,
        metadata={"help": "As train_data; these videos are tracked.", "metavar": "FOLDER|{...}"},
    )
    num_frames: int = field(default=8, metadata={"help": "Frames of a clip."})
    stride: int = field(default=1, metadata={"help": "Step between a clip's frames, in annotated frames."})
    max_objects: int = field(default=3, metadata={"help": "Objects of a clip."})
    reverse_probability: float = field(default=0.5, metadata={"help": "Share of clips that run backward."})
    clips_per_video: int = field(default=1, metadata={"help": "Clips drawn of each video in an epoch."})
    augmentation: dict | None = field(
        default=None, metadata={"help": "Arguments of `training_transforms`; {} for SAM 2's, none for no augmentation."}
    )
    on_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "With a sample that cannot be used: raise, or skip."}
    )


@dataclass
class TrainingKeys:
    """What is trained at which learning rate, and how; beside the keys of transformers' `TrainingArguments`."""

    _argument_group_name: ClassVar[str] = "training"

    trainable: list[str] = field(
        default_factory=lambda: ["experts"],
        metadata={
            "help": "Sets of parameters that are trained: experts, adapters, memory, decoder, all or an expression."
        },
    )
    learning_rates: dict = field(
        default_factory=dict,
        metadata={"help": 'Rates of some of these sets, such as "{decoder: 1.0e-5}"; of the others `learning_rate`.'},
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
    fit: str | None = field(
        default=None,
        metadata={
            "help": "The GPU's device memory, such as 16GB: chooses batch size, accumulation, checkpointing, encoder "
            "batches and cache, see docs/small_gpus.md."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew in a folder with another run, whose checkpoints are removed."}
    )
