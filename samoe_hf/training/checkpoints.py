"""Which checkpoints of a run are whole, and where a run may write."""

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from samoe_hf.errors import InputError, file_in_the_way
from samoe_hf.model.domain_files import domain_file

from .arguments import SamoeTrainingArguments

logger = logging.getLogger(__name__)

ANOTHER_RUN = (
    "`output_dir` {} holds another run. Give another one, `resume_from_checkpoint: last` to go on, or "
    "`overwrite_output_dir: true`."
)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run in a folder, the newest first, without those that were not written to their end."""
    return [path for path in _checkpoint_folders(output_dir) if (path / TRAINER_STATE_NAME).is_file()]


def _checkpoint_folders(output_dir: str | Path) -> list[Path]:
    # Other names, such as `checkpoint-3-good` or `checkpoint-old-3`, are of copies that a user made.
    is_own = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    folders = [path for path in Path(output_dir).glob("*") if is_own.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint: first the file that Trainer writes last."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def rotate_checkpoints(output_dir: str | Path, save_total_limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints above a number, if it is positive, but neither the newest nor the best one.

    Trainer's own rotation also removes folders of users whose names begin with `checkpoint-`.
    """
    if save_total_limit is None or save_total_limit <= 0:
        return
    found = list_checkpoints(output_dir)
    kept = {path for path in found if path == found[0] or (best and path.resolve() == Path(best).resolve())}
    others = [path for path in found if path not in kept]
    for checkpoint in others[max(save_total_limit - len(kept), 0) :]:
        remove_checkpoint(checkpoint)


def clear_checkpoints(output_dir: str | Path) -> None:
    """Removes checkpoints that a killed process had not written, or not removed, to their end, and says so."""
    for checkpoint in _checkpoint_folders(output_dir):
        if not (checkpoint / TRAINER_STATE_NAME).is_file():
            print(f"{checkpoint}: removed, since a stopped process had not written it to its end.")
            remove_checkpoint(checkpoint)


def checkpoint_problems(checkpoint: str | Path, args: SamoeTrainingArguments) -> list[str]:
    """Files of a checkpoint that a kill left out or cut short; empty if a run can go on as if it had not stopped."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return ["is no folder"]
    needed = [CONFIG_NAME, TRAINER_STATE_NAME, SCHEDULER_NAME]
    needed += [f"rng_state_{rank}.pth" for rank in range(args.world_size)] if args.world_size > 1 else ["rng_state.pth"]
    if not (args.fsdp or args.deepspeed):  # whose sharded optimizers have formats of their own
        needed.append(OPTIMIZER_NAME)
    if _is_readable(folder / CONFIG_NAME):
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        needed += [f"{name}/{ADAPTER_SAFE_WEIGHTS_NAME}" for name in config.get("adapters") or []]
        needed += [domain_file(domain["name"]) for domain in config.get("domains") or [] if domain["num_experts"]]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    needed.append(index.name if index.exists() else SAFE_WEIGHTS_NAME)
    files = dict.fromkeys([*(folder / name for name in needed), *sorted(folder.rglob("*.safetensors"))])
    broken = [path for path in files if not _is_readable(path)]
    return [f"{path.relative_to(folder)} is {'damaged' if path.exists() else 'missing'}" for path in broken]


def _is_readable(path: Path) -> bool:
    """Whether a JSON, safetensors or `torch.save` file is there as a whole."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        else:
            return zipfile.is_zipfile(path)
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def resolve_checkpoint(resume_from_checkpoint: str | bool, args: SamoeTrainingArguments) -> str:
    """The checkpoint to go on from: the given folder; or for "last" or True, the newest whole one of `output_dir`."""
    is_last = resume_from_checkpoint in ("last", True)
    problems = []
    for checkpoint in list_checkpoints(args.folder) if is_last else [Path(str(resume_from_checkpoint))]:
        if not (found := checkpoint_problems(checkpoint, args)):
            for problem in problems:
                logger.warning("Not resumed from %s.", problem)
            return str(checkpoint)
        problems.append(f"{checkpoint}: {', '.join(found)}")
    where = f" in {args.output_dir}" if is_last else ""
    advice = "Give `overwrite_output_dir: true`" if _holds_run(args.folder) else "Leave it out"
    reason = f" ({'; '.join(problems)})" if problems else ""
    raise InputError(
        f"`resume_from_checkpoint` {resume_from_checkpoint} finds no whole checkpoint of as many processes as now"
        f"{where}{reason}. {advice} to start from the beginning."
    )


def check_output_dir(args: SamoeTrainingArguments, source: str | None) -> None:
    """Refuses to write where a run would destroy another run's result or its own base model, the `source`."""
    output = args.folder.resolve()
    if (file := file_in_the_way(output)) is not None:
        raise InputError(f"`output_dir` {args.output_dir} must be a folder, but {file} is a file.")
    base = None if source is None or not Path(source).is_dir() else Path(source).resolve()
    if base is not None and (base == output or output in base.parents):
        raise InputError(
            f"`output_dir` {args.output_dir} holds the base model `model_name_or_path` {source}, which the run would "
            "overwrite; give another output."
        )
    if args.resume_from_checkpoint is None and not args.overwrite_output_dir and _holds_run(output):
        raise InputError(ANOTHER_RUN.format(args.output_dir))


def _holds_run(folder: Path) -> bool:
    return (folder / CONFIG_NAME).exists() or bool(list_checkpoints(folder))
