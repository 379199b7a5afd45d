"""Files and folders that are written whole or not at all."""

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import CONFIG_NAME

_WEIGHTS = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


@contextmanager
def complete_files(directory: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder whose files are moved to `directory` once the block ends, or vanish if it raises.

    Weights of an earlier save go when others come. If the block raises, `directory` is as it was before. Files may lie
    in folders; the configuration, which tells of the others, comes last.
    """
    target = Path(directory)
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    # Inside, to be on the same file system; Trainer does not upload what begins with an underscore.
    temporary = Path(tempfile.mkdtemp(prefix="_", dir=target))
    try:
        yield temporary
        files = [file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file()]
        names = {str(file) for file in files}
        if any(map(_WEIGHTS.fullmatch, names)):
            for old in target.iterdir():
                if _WEIGHTS.fullmatch(old.name) and old.name not in names:
                    old.unlink()
        for file in sorted(files, key=lambda file: str(file) == CONFIG_NAME):
            (target / file).parent.mkdir(exist_ok=True)
            os.replace(temporary / file, target / file)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and not any(target.iterdir()):
            target.rmdir()


@contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder that becomes `directory` once the block ends, and vanishes if it raises.

    Raises:
        FileExistsError: at once, if `directory` is a file or a folder that is not empty.
    """
    target = Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty folder; give another output.")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
