"""What `samoe domains` and the page of `samoe app` tell of a model's domains, and take from others."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from samoe_hf.data.annotations import Shapes
from samoe_hf.data.frames import FrameSequence
from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError, input_errors
from samoe_hf.evaluation.report import NO_NUMBER, describe_choice
from samoe_hf.hub.repository import find_domains
from samoe_hf.model.base import MODEL_TYPES
from samoe_hf.model.base_model import build_on_meta
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.domain_experts import count_domain_values
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.model.weights_files import resolve_commit
from samoe_hf.model.weights_trained import is_original_checkpoint
from samoe_hf.plots.domains import draw_domains
from samoe_hf.surgery.domains import merge_domains, remove_domain, rename_domain
from samoe_hf.surgery.gate import distances_between
from samoe_hf.whole_files import new_folder, whole_file

from .fit_gate import confirm_video, decide_frame

EXAMPLES = "examples"  # the folder of pictures, NAME.jpg or NAME.png
NOTHING_FOUND = "Nothing on the Hub has domains on {0}. If {0} is a whole copy of its base, ask for that base."
HEADINGS = ("domain", "experts", "rank", "MB", "videos that the gate knows")


def list_domains(model: SamoeModel, config: SamoeConfig | None = None) -> list[list[object]]:
    """A row for each domain of a model, as [`HEADINGS`] say. No experts are read for it.

    Args:
        config: of a model that was loaded without experts, that of the whole one.
    """
    rows, config = [], config or model.config
    plain = build_on_meta(config.without_domain_experts()) if config.domains else model
    sizes = count_domain_values(plain, config.domains or ())
    counts = [] if model.domain_gate is None else model.domain_gate.counts.tolist()
    for domain, count in zip(config.domains or [], counts, strict=True):
        megabytes = sizes.get(domain["name"], 0) * model.dtype.itemsize / 1e6
        rank = domain["lora_rank"] if domain["num_experts"] else NO_NUMBER
        rank = f"up to {rank}" if "rank_pattern" in domain else rank
        size = f"{megabytes:.2f}" if megabytes >= 0.1 else f"{megabytes:.1g}"
        rows.append([domain["name"], domain["num_experts"], rank, size, count])
    return rows


def find_example(source: str, name: str) -> str | None:
    """The picture of a domain that the owner of a folder or Hub repository put there; None without one."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    pictures = (cached_file(source, f"{EXAMPLES}/{name}.{suffix}", **options) for suffix in ("jpg", "png"))
    return next((path for path in pictures if path is not None), None)


def draw_map(model: SamoeModel, find: Callable[[str], str | None]) -> Figure:
    """Draws how near domains are to each other for the gate; InputError where it knows none.

    `find` gives the picture of a domain, if there is one.
    """
    gate = model.domain_gate
    known = [] if gate is None else [name for name, count in zip(gate.domains, gate.counts, strict=True) if count]
    if gate is None or not known:
        raise InputError("The model has no domain that its gate knows.")
    examples = {name: path for name in known if (path := find(name)) is not None}
    return draw_domains(gate.domains, distances_between(gate), examples)


def load_without_experts(source: str, but: Sequence[str] = (), **options: Any) -> tuple[SamoeModel, SamoeConfig]:
    """Loads a model, and of its domains only the experts of those in `but`; the others' are not fetched.

    Returns:
        the model, and the configuration of the whole one.
    """
    if is_original_checkpoint(source):
        model = SamoeModel.from_pretrained(source, **options)
        return model, model.config
    commit = resolve_commit(source, {})
    hub = {} if commit is None else {"revision": commit}
    config = SamoeConfig.from_pretrained(source, **hub)
    return SamoeModel.from_pretrained(source, config=config.without_domain_experts(but), **hub, **options), config


def without_experts_of(source: str, name: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model without the experts of one of its domains, whose file may be gone."""
    if is_original_checkpoint(source):
        return {}
    resolve_commit(source, {})
    config = SamoeConfig.from_pretrained(source)
    return {"config": config.without_domain_experts({*config.domain_names} - {name})}


def load_for_domains(source: str, names: Sequence[str], like: SamoeModel) -> SamoeModel:
    """Loads the model that `like` gets domains of, those of `names` or all, see [`take_domains`]."""
    of_names = load_without_experts(source, names, dtype=like.dtype)[0] if names else None
    other: Any = of_names or SamoeModel.from_pretrained(source, dtype=like.dtype)
    return other.to(like.device)


def take_domains(
    model: SamoeModel, other: SamoeModel, names: Sequence[str] = (), new_name: str | None = None
) -> dict[str, str]:
    """Adds domains of another model as [`~surgery.domains.merge_domains`] does; the other one is of no use afterwards.

    All are taken if `names` is empty; one may get a `new_name`. Returns new names -> those in the other model.
    """
    known = other.config.domain_names
    if lacking := [name for name in names if name not in known]:
        has = ", ".join(map(repr, known)) or "none"
        raise InputError(f"The other model has no domain {lacking[0]!r}; it has {has}.")
    for name in known if names else []:
        if name not in names:
            remove_domain(other, name)
    taken = other.config.domain_names
    if new_name is not None:
        if len(taken) != 1:
            raise InputError(
                f"Another name (`--as`) is for one domain, but {len(taken)} are taken: {', '.join(taken)}; say which "
                "(`--domain`)."
            )
        rename_domain(other, taken[0], new_name)
    return dict(zip(merge_domains(model, other), taken, strict=True))


def confirm(
    model: SamoeModel,
    processor: VideoProcessor,
    frames: FrameSequence,
    domain: str,
    turns: Callable[[Iterator[Any]], Iterable[Any]] = iter,
) -> str:
    """Tells the gate of one more video of a domain, see [`confirm_video`]; says what it took it for, and does now."""
    video = Video("", frames, Shapes({}, []))
    (before,) = turns(decide_frame(model, processor, video, t) for t in (0,))
    confirm_video(model, processor, domain, video, turns)
    (after,) = turns(decide_frame(model, processor, video, t) for t in (0,))
    said = [describe_choice(one.domain or "base", one.confidence, one.rivals) for one in (before, after)]
    return f"the gate took it for {said[0]}; now for {said[1]}."


def find_on_hub(model: SamoeModel, source: str) -> tuple[str, dict[str, list[str]]]:
    """The base of a model that was loaded from `source`, and as [`find_domains`] who has domains on it."""
    base = (model.origin.source or {}).get("name_or_path") or source
    if os.path.isabs(base):
        raise InputError(
            f"The base, {os.path.basename(base)}, is one which only this machine has, so nobody else builds on it."
        )
    with input_errors():
        return base, find_domains(base)


def save_as_it_came(
    model: SamoeModel, processor: VideoProcessor, source: str, output: str | os.PathLike, examples: Mapping[str, str]
) -> None:
    """Saves a model that was loaded from `source`: whole, or only what was trained, which names a base of the Hub.

    `output` is the source itself, or a new folder, which is written whole or not at all; another one is an InputError.
    `examples` are pictures by domain.
    """
    is_whole = (model.origin.source or {}).get("name_or_path") in (os.path.abspath(source), source)
    if is_whole and not os.path.exists(source):
        config, _ = PreTrainedConfig.get_config_dict(source, revision=model.origin.commit)
        is_whole = config.get("model_type") not in MODEL_TYPES
    in_place = os.path.isdir(source) and os.path.abspath(output) == os.path.abspath(source)
    with input_errors(), nullcontext(output) if in_place else new_folder(output) as folder:
        # Before the model, which would stay without them where this is stopped.
        for name, path in examples.items():
            target = Path(folder, EXAMPLES, name).with_suffix(Path(path).suffix)
            if not (target.exists() and target.samefile(path)):
                with whole_file(target) as copy:
                    shutil.copyfile(path, copy)
        model.save_pretrained(folder, experts_only=not is_whole, processor=processor)
