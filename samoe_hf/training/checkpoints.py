"""Which checkpoints of a run are whole, and where a run may write."""

import json
import logging
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from samoe_hf.errors import InputError

from .arguments import SamoeTrainingArguments

logger = logging.getLogger(__name__)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbered = [path for path in folders if path.name.rpartition("-")[2].isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def checkpoint_problems(checkpoint: str | Path, args: SamoeTrainingArguments) -> list[str]:
    """What keeps a run from going on as if it had not stopped at this checkpoint; empty if it is whole."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return ["is no folder"]
    # A process that is killed leaves files cut short; the configuration and the state are written last.
    states = [SCHEDULER_NAME]
    states += [f"rng_state_{i}.pth" for i in range(args.world_size)] if args.world_size > 1 else ["rng_state.pth"]
    # Sharded optimizers have formats of their own.
    if not (args.fsdp or args.deepspeed):
        states.append(OPTIMIZER_NAME)
    problems = [
        f"{name} is {'damaged' if (folder / name).exists() else 'missing'}"
        for name in [CONFIG_NAME, TRAINER_STATE_NAME, *states]
        if not _is_readable(folder / name)
    ]
    weights = sorted(folder.rglob("*.safetensors"))
    if not ((folder / SAFE_WEIGHTS_NAME).exists() or _is_readable(folder / SAFE_WEIGHTS_INDEX_NAME)):
        problems.append(f"{SAFE_WEIGHTS_NAME} is missing")
    return problems + [f"{path.relative_to(folder)} is damaged" for path in weights if not _is_readable(path)]


def _is_readable(path: Path) -> bool:
    """Whether a JSON, safetensors or `torch.save` file is there as a whole."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        else:
            return zipfile.is_zipfile(path)
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def resolve_checkpoint(resume_from_checkpoint: str | bool, args: SamoeTrainingArguments) -> str:
    """The checkpoint to go on from.

    Args:
        resume_from_checkpoint: a folder; or "last" or True, for the newest whole checkpoint of `args.output_dir`.

    Raises:
        ValueError: if there is none, or the folder is no whole checkpoint; says what is missing.
    """
    if resume_from_checkpoint not in ("last", True):
        if problems := checkpoint_problems(resume_from_checkpoint, args):
            raise InputError(
                f"`resume_from_checkpoint` must be a whole checkpoint of as many processes as now, but of "
                f"{resume_from_checkpoint} {', '.join(problems)}."
            )
        return str(resume_from_checkpoint)
    found = []
    for checkpoint in list_checkpoints(args.output_dir):
        problems = checkpoint_problems(checkpoint, args)
        if not problems:
            for skipped in found:
                logger.warning("Not resumed from %s.", skipped)
            return str(checkpoint)
        found.append(f"{checkpoint}: {', '.join(problems)}")
    reason = f" ({'; '.join(found)})" if found else ""
    raise InputError(
        f"`resume_from_checkpoint` {resume_from_checkpoint} finds no whole checkpoint in {args.output_dir}{reason}. "
        "Leave it out to start from the beginning."
    )


def check_output_dir(args: SamoeTrainingArguments, source: str | None) -> None:
    """Refuses to write where a run would destroy another run's result or its own base model.

    Args:
        source: the folder, file or Hub id of the base model.

    Raises:
        ValueError: if the base model lies in `args.output_dir`; or if a model or checkpoints are there and the run
            neither resumes nor has `overwrite_output_dir`.
    """
    output = Path(args.output_dir).resolve()
    base = None if source is None or not Path(source).is_dir() else Path(source).resolve()
    if base is not None and (base == output or output in base.parents):
        raise InputError(
            f"`output_dir` {args.output_dir} holds the base model `model_name_or_path` {source}, which the run would "
            "overwrite; give another output."
        )
    starts_anew = args.resume_from_checkpoint is None and not args.overwrite_output_dir
    if starts_anew and ((output / CONFIG_NAME).exists() or list_checkpoints(output)):
        raise InputError(
            f"`output_dir` {args.output_dir} holds another run. Give another one, `resume_from_checkpoint: last` to go "
            "on, or `overwrite_output_dir: true`."
        )


def remove_checkpoints(output_dir: str | Path) -> None:
    """Removes all checkpoints in a folder."""
    for checkpoint in list_checkpoints(output_dir):
        shutil.rmtree(checkpoint)
