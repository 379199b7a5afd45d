"""Configuration of SAMoE: SAM 2 video plus the settings of its experts."""

import copy
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import Sam2VideoConfig

from .base import MODEL_TYPES, base_of, mask_size, settings_of_base
from .errors import InputError
from .memory_selection import MEMORY_SELECTIONS

# The projections that SAM2-MoE wraps: q, k, v and output of each self and cross attention of the memory attention.
MEMORY_ATTENTION_PROJECTIONS = [
    f"memory_attention.layers.*.{attention}.[qkvo]_proj" for attention in ("self_attn", "cross_attn_image")
]
# Older folders have regular expressions where patterns are now. Nobody vouches for them, and some never end, so they
# are not run: simple ones are read as the patterns that they stand for.
EXPRESSION = re.compile(r"\.|.*[\\()|]", re.DOTALL)
EXPRESSION_PARTS = {r"\.": ".", r".*": "*", r"\d+": "*"}
MAX_PATTERNS = 100
EXPRESSION_TEXT = r"(?:\w|\[\w+\]|\\\.|\.\*|\\d\+)*"

# What SAM2-MoE and PEFT call some of the settings.
OLD_EXPERT_SETTINGS = {
    "top_k": "num_experts_per_tok", "rank": "lora_rank", "lora_r": "lora_rank", "alpha": "lora_alpha"
}  # fmt: skip
# A domain's name is part of its tensors' names, and a word on the command line.
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,63}", re.ASCII)
# Words that stand for something else where a domain is named.
RESERVED_NAMES = ("auto", "none", "base")

# Types of models that lack what tracking needs.
OTHER_TYPES = {
    "sam": "an image model, SAM ('sam'), without a memory",
    "edgetam": "EdgeTAM's image model alone ('edgetam'), without its memory",
    "sam2": "SAM 2's image model alone ('sam2'), without its memory",
    "sam3": "SAM 3's detector alone ('sam3'), without its tracker",
    "sam3_tracker": "SAM 3's image model alone ('sam3_tracker'), without its memory",
}
# Of a `dtype`, as a string or as PyTorch prints it.
FLOAT_TYPE = re.compile(r"None|(torch\.)?b?float(16|32|64)")

# What a wrong value may raise where a configuration is made of it.
WRONG_VALUE = (
    *(StrictDataclassError, ValueError, TypeError),
    *(AttributeError, LookupError, ArithmeticError, RecursionError),
)

# No integer in the configuration of a model is larger.
LARGEST_INTEGER = 2**20


class Rule(NamedTuple):
    """What a setting may be, in words and as a test of its value."""

    allowed: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def integer(minimum: int) -> Rule:
    """Integers from a minimum on."""
    return Rule(f"an integer of at least {minimum}", lambda x: _is_number(x) and isinstance(x, int) and x >= minimum)


def number(allowed: str, holds: Callable[[float], bool]) -> Rule:
    """Finite numbers for which something holds."""
    return Rule(f"a number {allowed}", lambda x: _is_number(x) and holds(x))


def mapping(kinds: str, kind: Any) -> Rule:
    """None, or mappings from names to values of a kind."""

    def holds(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items())

    return Rule(f"a mapping from names to {kinds}, or None", lambda value: value is None or holds(value))


def _are_modules(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    is_list = isinstance(names, list | tuple) and len(names) > 0
    return is_list and all(isinstance(x, str) and x and not EXPRESSION.match(x) for x in names)


MODULES = "a non-empty list of names of modules, ends of names, or patterns with *, ? and [ ]"


# What is set of the experts of a model, or of a domain's.
EXPERT_RULES = {
    "num_experts": integer(1),
    "num_experts_per_tok": integer(1),
    "lora_rank": integer(1),
    "lora_alpha": number(f"above 0 and at most {LARGEST_INTEGER}", lambda x: 0 < x <= LARGEST_INTEGER),
    "lora_dropout": number("at least 0 and below 1", lambda x: 0 <= x < 1),
    "expert_modules": Rule(MODULES, _are_modules),
    "exclude_modules": Rule(f"{MODULES}, or None", lambda value: value is None or _are_modules(value)),
}
EXPERT_SETTINGS = tuple(EXPERT_RULES)
# What a video of no known domain gets.
UNKNOWN = ("base", "nearest", "mix")
# What all domains of a model share, and track by.
SHARED_SETTINGS = (
    "image_size", "memory_selection", "recent_memory_pooling", "older_memory_pooling", "fill_hole_area",
    "previous_mask_with_clicks",
)  # fmt: skip
RANK_PATTERN = Rule(
    "a mapping from names of layers to ranks of at least 1",
    lambda value: isinstance(value, dict) and all(isinstance(k, str) and integer(1).holds(v) for k, v in value.items()),
)
OTHER_RULES = {
    "router_aux_loss_coef": number("at least 0", lambda x: x >= 0),
    "output_router_logits": Rule("True or False", lambda value: isinstance(value, bool)),
    "previous_mask_with_clicks": Rule("True or False", lambda value: isinstance(value, bool)),
    "fill_hole_area": integer(0),
    "recent_memory_pooling": integer(1),
    "older_memory_pooling": integer(1),
    "memory_attention_dropout": number("from 0 to 1", lambda x: 0 <= x <= 1),
    "memory_attention_rope_dropout": number("from 0 to 1", lambda x: 0 <= x <= 1),
    "memory_selection": Rule(f"one of {', '.join(MEMORY_SELECTIONS)}", [None, *MEMORY_SELECTIONS].__contains__),
    "unknown": Rule(f"one of {', '.join(UNKNOWN)}", lambda value: value in UNKNOWN),
    "base_model": mapping("texts", str | None),
    "adapters": mapping("True or False", bool),
}


class SamoeConfig(Sam2VideoConfig):
    r"""
    Configuration of a [`SamoeModel`]: everything of [`~transformers.Sam2VideoConfig`] and the settings of the mixture
    of LoRA experts. The defaults are those of SAM2-MoE.

    Args:
        num_experts (`int`, *optional*, defaults to 10):
            Experts of each wrapped projection.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            Experts that the router keeps for each token (top k).
        lora_rank (`int`, *optional*, defaults to 4):
            Rank of each expert.
        lora_alpha (`float`, *optional*, defaults to 1.0):
            Numerator of the experts' scale, `lora_alpha / lora_rank`.
        lora_dropout (`float`, *optional*, defaults to 0.1):
            Dropout probability on the router's input and between the two matrices of an expert, in training.
        expert_modules (`str` or `list[str]`, *optional*, defaults to the projections of the memory attention):
            Linear layers that get experts: names of modules, ends of names (from a dot on), or patterns for either, in
            which `*` stands for any text, `?` for a character and `[qv]` for one of several.
        exclude_modules (`str` or `list[str]`, *optional*):
            Layers that get none although `expert_modules` includes them, in the same way.
        domains (`list[dict]`, *optional*):
            Domains whose experts are apart, in the order in which they were learned. Each is a dictionary of its `name`
            and its own `num_experts` (0 for a domain on which the base is good as it is), `num_experts_per_tok`,
            `lora_rank`, `lora_alpha`, `lora_dropout`, `expert_modules` and `exclude_modules`; and, if layers differ,
            `rank_pattern`, from names of layers to ranks other than `lora_rank`, scaled by `lora_alpha / rank`. With
            None, all experts are for all videos.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.0):
            Weight of the routers' load-balancing loss; 0 turns it off.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether the clip forward returns the routers' logits.
        previous_mask_with_clicks (`bool`, *optional*, defaults to `True`):
            Whether a click on a frame that already has a mask refines that mask, as `sam2` does; `False` starts from
            the clicks alone, as `Sam2VideoModel` does.
        fill_hole_area (`int`, *optional*, defaults to 0):
            Holes of up to this many pixels in the low-resolution masks are filled while tracking (`sam2`: 8, on GPUs).
        recent_memory_pooling, older_memory_pooling (`int`, *optional*, defaults to 1):
            The memory of the last frame, and those of the frames before it, are averaged over squares of so many tokens
            a side. Memories of conditioning frames stay whole, and with 1 all do. The fewer tokens, the less an object
            costs, in tracking and in training.
        memory_selection (`str`, *optional*, defaults to the base's own):
            Which memories a frame reads: `"recent"`, the last ones, as SAM 2; `"score"`, the last ones on which the
            object was seen well, as SAM 3; or `"distractor"`, those that tell it from its doubles, as DAM4SAM.
        unknown (`str`, *optional*, defaults to `"base"`):
            What a video of no known domain gets: `"base"`, the base model's output; `"nearest"`, the experts of the
            domain that the gate finds likeliest; or `"mix"`, half of what these add, between the two.
        base_model (`dict`, *optional*):
            In a folder that holds only what was trained: the model that the rest comes from; see `weights_trained.py`.
        adapters (`dict[str, bool]`, *optional*):
            In a folder with adapters of PEFT: name of each, and whether it is active; see `adapters.py`.

    Raises:
        ValueError: for a value out of range, naming the field and what it allows.
    """

    if TYPE_CHECKING:  # transformers annotates them with all that a file may hold; bases have parts of their own
        image_size: int = 1024  # pyright: ignore[reportIncompatibleVariableOverride]  # checked to be one
        vision_config: Any = None
        prompt_encoder_config: Any = None
        mask_decoder_config: Any = None
        memory_attention_rope_feat_sizes: Any = None

    model_type = "samoe"
    # Trainer gathers the tensors that evaluation returns; these are for training logs and for analysis.
    keys_to_ignore_at_inference: ClassVar = ["loss_dict", "router_logits", "domains"]

    num_experts: int = 10
    num_experts_per_tok: int = 2
    lora_rank: int = 4
    lora_alpha: float = 1.0
    lora_dropout: float = 0.1
    expert_modules: str | list[str] = field(default_factory=MEMORY_ATTENTION_PROJECTIONS.copy)
    exclude_modules: str | list[str] | None = None
    domains: list[dict[str, Any]] | None = None
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False
    previous_mask_with_clicks: bool = True
    fill_hole_area: int = 0
    recent_memory_pooling: int = 1
    older_memory_pooling: int = 1
    memory_selection: str | None = None
    unknown: str = "base"
    base_model: dict[str, str | None] | None = None
    adapters: dict[str, bool] | None = None

    def __post_init__(self, **kwargs):
        check_old_names(kwargs)
        super().__post_init__(**kwargs)
        base_of(self).complete(self)
        if self.memory_selection is None:
            self.memory_selection = base_of(self).memory_selection
        read_expressions(vars(self))
        if isinstance(self.domains, list | tuple):
            self.domains = [dict(domain) if isinstance(domain, Mapping) else domain for domain in self.domains]
            for domain in self.domains:
                if isinstance(domain, dict):
                    domain.setdefault("exclude_modules", None)
                    read_expressions(domain)
        self.check_experts()

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a field, also of a model that is there, which is read from then on; see [`OTHER_RULES`]."""
        if name in OTHER_RULES:
            _check(name, value, OTHER_RULES[name])
        super().__setattr__(name, value)

    def check_experts(self) -> None:
        """Raises a `ValueError` that names the first field with a value out of range."""
        check_expert_settings({name: getattr(self, name) for name in EXPERT_SETTINGS})
        base = base_of(self)
        _check("vision_config.backbone_config.patch_size", base.stride(self), integer(1))
        self._check_image_size(self.image_size)
        base.check_pooling(self)
        parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
        for prefix, part in {"": self, **{f"{name}.": getattr(self, name) for name in parts}}.items():
            dtype = getattr(part, "dtype", None)
            if not FLOAT_TYPE.fullmatch(str(dtype)):
                raise InputError(f"`{prefix}dtype` must be a floating-point type or None, got {dtype!r}.")
        check_domains(self.domains)

    @property
    def domain_names(self) -> list[str]:
        """Names of the domains, in order."""
        return [domain["name"] for domain in self.domains or ()]

    def without_domain_experts(self, but: Collection[str] = ()) -> "SamoeConfig":
        """A copy whose domains have no experts, except those of the names in `but`."""
        config = copy.deepcopy(self)
        config.domains = self.domains and [
            domain if domain["name"] in but else {**domain, "num_experts": 0} for domain in self.domains
        ]
        return config

    def expert_settings(self) -> dict[str, Any]:
        """The settings of a mixture of experts in a layer: those in [`EXPERT_SETTINGS`] but which layers it is of."""
        return {name: getattr(self, name) for name in EXPERT_SETTINGS if not name.endswith("_modules")}

    def check_feature_sizes(self) -> None:
        """Raises a `ValueError` if features of images or masks would be of other sizes than the model expects."""
        for name, (value, expected) in self._feature_sizes().items():
            if value != expected:
                raise InputError(f"`{name}` must be {expected} in this configuration, got {value}.")

    def resize(self, image_size: int) -> None:
        """Has the model take frames of another height and width: sizes of features, masks and positions follow.

        The weights are the same. They were trained for another size, so what the model finds changes.

        Raises:
            ValueError: if the base cannot take this size, or the sizes so far do not fit each other.
        """
        self.check_feature_sizes()
        self._check_image_size(image_size)
        self.image_size = image_size  # pyright: ignore[reportIncompatibleVariableOverride]
        for name, (value, expected) in self._feature_sizes().items():
            *parts, field_name = name.split(".")
            if value != expected:
                setattr(reduce(getattr, parts, self), field_name, expected)
        self.check_experts()

    def _check_image_size(self, image_size: Any) -> None:
        multiple = base_of(self).size_multiple(self)
        is_multiple = Rule(f"a multiple of {multiple}", lambda x: integer(1).holds(x) and x % multiple == 0)
        _check("image_size", image_size, is_multiple)

    def _feature_sizes(self) -> dict[str, tuple[Any, Any]]:
        """Fields that leave no trace in the shapes of weights: name -> (value, expected)."""
        prompts = self.prompt_encoder_config
        sizes = [[mask_size(self) // ratio] * 2 for ratio in (1, 2, 4)]
        return base_of(self).encoder_sizes(self, sizes) | {
            "prompt_encoder_config.image_size": (prompts.image_size, self.image_size),
            "prompt_encoder_config.patch_size": (prompts.patch_size, base_of(self).stride(self)),
            "memory_attention_rope_feat_sizes": (list(self.memory_attention_rope_feat_sizes), sizes[-1]),
            "mask_downsampler_padding": (self.mask_downsampler_padding, self.mask_downsampler_kernel_size // 2),
            "memory_fuser_padding": (self.memory_fuser_padding, self.memory_fuser_kernel_size // 2),
        }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "SamoeConfig":
        """Reads a configuration. One with a wrong value, or another file, is an `InputError` that names it."""
        kwargs.setdefault("name_or_path", pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the settings. A configuration of SAM 2 video or of SAM 3, alone or with its detector, is taken as a
        SAMoE configuration with default experts."""
        with _naming(pretrained_model_name_or_path):
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            if not isinstance(config_dict, dict):
                raise InputError(f"It must hold a mapping, got {type(config_dict).__name__}.")
            known = (cls.model_type, *MODEL_TYPES)
            if (model_type := config_dict.get("model_type", cls.model_type)) not in known:
                names = ", ".join(map(repr, known))
                what = OTHER_TYPES.get(model_type, f"a model of type {model_type!r}")
                raise InputError(f"It is of {what}; expected one of {names}.")
            for name, value in named_integers(config_dict):
                if abs(value) > LARGEST_INTEGER:  # before anything of that size is made
                    raise InputError(
                        f"`{name}` is {value}; nothing in a configuration is larger than {LARGEST_INTEGER}."
                    )
            return _without_base_type(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "SamoeConfig":
        """Makes a configuration of settings, also of a base's own; values given as keyword arguments are checked.

        Raises:
            ValueError: for a wrong value; names the folder or Hub id if `name_or_path` says that it was read from one.
        """
        check_old_names(kwargs)
        # In a file they mean something else, such as `top_k` of text that is generated.
        own = {name: value for name, value in config_dict.items() if name not in OLD_EXPERT_SETTINGS}
        with _naming(kwargs.get("name_or_path")):
            result = super().from_dict(_without_base_type(own), **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        assert isinstance(config, SamoeConfig)
        config.check_experts()
        return result  # pyright: ignore[reportReturnType]  # transformers asks for a tuple by `return_unused_kwargs`


def _without_base_type(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a SAMoE configuration, also from a base's own."""
    is_base = config_dict.get("model_type") in MODEL_TYPES
    return {**(settings_of_base(config_dict) if is_base else config_dict), "model_type": SamoeConfig.model_type}


@contextmanager
def _naming(source: Any) -> Iterator[None]:
    """Turns errors of wrong values into a `ValueError` that names the folder or Hub id, unless that is None."""
    try:
        yield
    except WRONG_VALUE as error:
        where = "" if source is None else f"{source}: config.json has a wrong value. "
        raise InputError(f"{where}{error}") from error


def check_old_names(given: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for a setting that is given by the name that it has elsewhere."""
    for name in given:
        if name in OLD_EXPERT_SETTINGS:
            raise InputError(f"`{name}` is called `{OLD_EXPERT_SETTINGS[name]}` here.")


def read_expressions(settings: dict[str, Any]) -> None:
    """Puts patterns in the place of a simple regular expression of older folders, see [`EXPRESSION`]."""
    expression = settings.get("expert_modules")
    if not isinstance(expression, str) or not EXPRESSION.match(expression):
        return
    text = rf"{EXPRESSION_TEXT}(?:\|{EXPRESSION_TEXT})*"
    _, excluded, rest = re.split(rf"^(?:\(\?!({text})\))?", expression, maxsplit=1)
    texts = re.split(r"\(([\w|]+)\)", rest)  # each second one holds alternatives
    choices = [text.split("|") if number % 2 else [text] for number, text in enumerate(texts)]
    is_simple = all(re.fullmatch(EXPRESSION_TEXT, text) for text in texts[::2])
    if not is_simple or math.prod(map(len, choices)) > MAX_PATTERNS:
        return
    settings["expert_modules"] = [_pattern("".join(chosen)) for chosen in itertools.product(*choices)]
    if excluded:
        settings["exclude_modules"] = [_pattern(text) + "*" for text in excluded.split("|")]


def _pattern(expression: str) -> str:
    """A pattern for the text that an expression of [`EXPRESSION_PARTS`] and characters stands for."""
    return re.sub(r"\\\.|\.\*|\\d\+", lambda part: EXPRESSION_PARTS[part[0]], expression)


def check_expert_settings(settings: Mapping[str, Any], owner: str = "") -> None:
    """Raises a `ValueError` that names the first of [`EXPERT_SETTINGS`] out of range, and the domain that owns them."""
    for name, rule in EXPERT_RULES.items():
        _check(name, settings[name], rule, owner)
    if settings["num_experts_per_tok"] > settings["num_experts"]:
        raise InputError(
            f"{owner}`num_experts_per_tok` must be at most `num_experts` ({settings['num_experts']}), "
            f"got {settings['num_experts_per_tok']}."
        )


def _check(name: str, value: Any, rule: Rule, owner: str = "") -> None:
    if not rule.holds(value):
        raise InputError(f"{owner}`{name}` must be {rule.allowed}, got {value!r}.")


def check_domains(domains: Any) -> None:
    """Raises a `ValueError` if these cannot be the `domains` of a configuration."""
    if domains is None:
        return
    fields = ("name", *EXPERT_SETTINGS)
    is_fit = isinstance(domains, list | tuple) and all(
        isinstance(x, Mapping) and {*x} - {"rank_pattern"} == {*fields} for x in domains
    )
    if not is_fit:
        raise InputError(f"`domains` must be a list of dictionaries of {', '.join(fields)}, or None, got {domains!r}.")
    for domain in domains:
        check_domain_name(domain["name"])
        _check("rank_pattern", domain.get("rank_pattern", {}), RANK_PATTERN, f"Domain {domain['name']!r}: ")
        if not (domain["num_experts"] == 0 and integer(0).holds(domain["num_experts"])):
            check_expert_settings(domain, f"Domain {domain['name']!r}: ")
    names = [domain["name"].lower() for domain in domains]  # each is a file's, and some file systems know no case
    if twice := [domain["name"] for domain in domains if names.count(domain["name"].lower()) > 1]:
        raise InputError(f"`domains` has two of the name {twice[0]!r}, as far as files are told apart by it.")


def check_domain_name(name: Any) -> None:
    """Raises a `ValueError` if a domain cannot have this name."""
    if not isinstance(name, str) or not DOMAIN_NAME.fullmatch(name) or name.lower() in RESERVED_NAMES:
        raise InputError(
            "A domain's name must be of letters (a to z), digits, _ and -, begin with a letter or digit, and be none "
            f"of {', '.join(RESERVED_NAMES)}, got {name!r}."
        )


def named_integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """All integers in the content of a configuration, with the name of the field that each is in."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from named_integers(part, str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from named_integers(part, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value
