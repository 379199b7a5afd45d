"""Damaged and hostile files of the original: each is refused by name, soon and in little memory; none is executed."""

import itertools
import json
import logging
import multiprocessing
import resource
import signal
import time
from pathlib import Path

import psutil
import pytest

from helpers.hostile import hostile_checkpoints, hostile_yaml
from helpers.reference import CHECKPOINT, CONFIG
from samoe_hf.original.checkpoint import load_original

MAX_SECONDS, MAX_BYTES = 5, 1 << 30


def stop(*_: object) -> None:
    raise TimeoutError("too slow")


def read_hostile_files(folder: Path, log: Path, step: int) -> None:
    """Reads every `step`th file, in a process whose address space may grow by `MAX_BYTES`.

    Each is written to `folder` and removed again. To `log` goes a line of JSON before and after each.
    """
    logging.disable(logging.CRITICAL)
    canary = folder / "canary"
    load_original(CHECKPOINT, None, CONFIG)
    signal.signal(signal.SIGALRM, stop)
    limit, (_, hard) = psutil.Process().memory_info().vms + MAX_BYTES, resource.getrlimit(resource.RLIMIT_AS)
    kinds = {"yaml": hostile_yaml(CONFIG, canary), "pt": hostile_checkpoints(CHECKPOINT, canary)}
    with open(log, "w", buffering=1) as file:
        for kind, files in kinds.items():
            for number, (name, content) in enumerate(itertools.islice(files, 0, None, step)):
                path = folder / f"{number}.{kind}"
                path.write_bytes(content() if callable(content) else content)
                del content
                file.write(json.dumps({"case": f"{name}.{kind}"}) + "\n")
                resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
                signal.alarm(30)
                outcome = try_to_load(*((path, None, CONFIG) if kind == "pt" else (CHECKPOINT, None, path)), path)
                signal.alarm(0)
                resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
                path.unlink()
                file.write(json.dumps({"case": f"{name}.{kind}", **outcome}) + "\n")


def try_to_load(checkpoint: Path, experts: Path | None, config: Path, hostile: Path) -> dict:
    outcome, start = {"error": None}, time.process_time()
    try:
        load_original(checkpoint, experts, config)
    except BaseException as error:
        outcome = {
            "error": type(error).__name__,
            "message": str(error)[:300],
            "is_named": str(hostile) in str(error),
            "is_clear": isinstance(error, (ValueError, OSError)),
        }
    return {**outcome, "seconds": time.process_time() - start}


@pytest.mark.parametrize(
    ("step", "least"), [pytest.param(1, 100, marks=pytest.mark.slow, id="all"), pytest.param(26, 4, id="some")]
)
def test_hostile_files_are_refused_by_name(tmp_path, step, least):
    folder, log = tmp_path / "files", tmp_path / "log"
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(target=read_hostile_files, args=(folder, log, step))
    process.start()
    process.join(600)
    process.kill()
    results = [json.loads(line) for line in log.read_text().splitlines()]
    assert process.exitcode == 0, results[-1:]
    results = [result for result in results if "seconds" in result]
    assert len(results) >= least
    print(f"{len(results)} files, at most {max(result['seconds'] for result in results):.2f} s")
    bad = [r for r in results if not (r["error"] and r["is_clear"] and r["is_named"] and r["seconds"] < MAX_SECONDS)]
    assert bad == []
    assert list(folder.iterdir()) == [], "a file was executed, or something half-written was left"
