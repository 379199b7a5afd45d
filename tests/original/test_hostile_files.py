"""Damaged and hostile files of the original: each is refused by name, soon and in little memory; none is executed."""

import json
import os
import subprocess
import sys

import pytest

from helpers.reference import ROOT, reference_folder

MAX_SECONDS, MAX_BYTES = 5, 1 << 30
# Reads every file in one process, whose address space may grow by `MAX_BYTES`, and says what came of each.
RUN = """
import itertools, json, logging, pathlib, resource, signal, sys, time
from helpers.hostile import hostile_checkpoints, hostile_yaml
from samoe_hf.original.checkpoint import load_original

logging.disable(logging.CRITICAL)
checkpoint, config, folder = map(pathlib.Path, sys.argv[1:4])
max_bytes, step = map(int, sys.argv[4:6])

def too_slow(*_):
    raise TimeoutError("too slow")

def read(path):
    load_original(*((path, None, config) if path.suffix == ".pt" else (checkpoint, None, path)))

load_original(checkpoint, None, config)
signal.signal(signal.SIGALRM, too_slow)
canary = folder / "canary"
pages = int(open("/proc/self/statm").read().split()[0])
_, hard = resource.getrlimit(resource.RLIMIT_AS)
kinds = {"yaml": hostile_yaml(config, canary)}
if step == 1:
    kinds["pt"] = hostile_checkpoints(checkpoint, canary)
for kind, files in kinds.items():
    for number, (name, content) in enumerate(itertools.islice(files, 0, None, step)):
        path = folder / f"{number}.{kind}"
        path.write_bytes(content)
        del content
        result = {"case": f"{name}.{kind}", "error": None}
        print(json.dumps({"case": result["case"]}), flush=True)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + max_bytes, hard))
        signal.alarm(30)
        start = time.process_time()
        try:
            read(path)
        except BaseException as error:
            result |= {"error": type(error).__name__, "message": str(error)[:300], "is_named": str(path) in str(error),
                       "is_clear": isinstance(error, (ValueError, OSError))}
        result["seconds"] = time.process_time() - start
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        path.unlink()
        print(json.dumps(result), flush=True)
"""


@pytest.mark.parametrize(
    ("step", "least"),
    [pytest.param(1, 190, marks=pytest.mark.slow, id="all"), pytest.param(8, 10, id="some YAML files")],
)
def test_hostile_files_are_refused_by_name(tmp_path, step, least):
    nano = reference_folder("nano")
    checkpoint, config = nano / "sam2.1_hiera_nano.pt", nano / "sam2.1_hiera_nano_moe.yaml"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, checkpoint, config, tmp_path, str(MAX_BYTES), str(step)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, (results[-1:], run.stderr[-2000:])
    results = [result for result in results if "seconds" in result]
    assert len(results) >= least
    print(f"{len(results)} files, at most {max(result['seconds'] for result in results):.2f} s")
    bad = [r for r in results if not (r["error"] and r["is_clear"] and r["is_named"] and r["seconds"] < MAX_SECONDS)]
    assert bad == []
    assert list(tmp_path.iterdir()) == [], "a file was executed, or something half-written was left"
