"""A Python process of its own that talks to the test server: `HF_ENDPOINT` and caches are read at import.

Run as a script it executes what comes on its standard input. Imports cost seconds, so one process serves many tests.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

TOKEN = "hf_test"  # the test server's
ROOT = Path(__file__).parents[2]


class ClientError(Exception):
    """What was raised in the other process: its class's name, message and traceback."""


class Client:
    """Starts the process.

    Args:
        url: of the server.
        home: folder for its caches, empty for a fresh one.
        without: packages that cannot be imported there.
    """

    def __init__(self, url: str, home: Path, without: tuple[str, ...] = ()):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        environment |= {f"HF_HUB_DISABLE_{what}": "1" for what in ("XET", "PROGRESS_BARS", "TELEMETRY")}
        if not without:
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        home.mkdir(parents=True, exist_ok=True)
        self.log = open(home / "stderr.txt", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, *without],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment, cwd=home, text=True,
        )  # fmt: skip

    def run(self, code: str, **values):
        """Executes `code`, in which `values` have their names, and returns what it assigned to `result`.

        Raises:
            ClientError: if it raised.
        """
        values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        print(json.dumps([code, values]), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise ClientError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.log.close()


def _serve(without: list[str]) -> None:
    for package in without:
        sys.modules[package] = None
    sys.path.insert(0, str(ROOT / "tests" / "programs"))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        code, values = json.loads(line)
        try:
            exec(code, values)
            answer = {"result": values.get("result")}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
