"""A Python process of its own that talks to the test server: `HF_ENDPOINT` and caches are read at import.

Run as a script it executes what comes on its standard input. Imports cost seconds, so one process serves many tests.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


class ClientError(Exception):
    """What was raised in the other process; `kind` is the class's name, with those of its bases."""

    def __init__(self, kind: list[str], message: str, trace: str):
        super().__init__(f"{kind[0]}: {message}\n{trace}")
        self.kind, self.message = kind, message


class Client:
    """Starts the process.

    Args:
        url: of the server.
        home: folder for its caches, empty for a fresh one.
        token: of the user, None for a stranger.
        without: packages that cannot be imported there.
    """

    def __init__(self, url: str, home: Path, token: str | None, without: tuple[str, ...] = ()):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        if token is not None:
            environment["HF_TOKEN"] = token
        if not without:
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        home.mkdir(parents=True, exist_ok=True)
        self.log = open(home / "stderr.txt", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, *without],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            cwd=home,
            text=True,
        )

    def run(self, code: str, **values):
        """Executes `code`, in which `values` have their names, and returns what it assigned to `result`.

        Raises:
            ClientError: if it raised.
        """
        values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        print(json.dumps([code, values]), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        if "kind" in answer:
            raise ClientError(**answer)
        return answer["result"]

    def call(self, step: str, **values):
        """Calls a function of `programs/hub_steps.py`."""
        arguments = ", ".join(f"{name}={name}" for name in values)
        return self.run(f"import hub_steps\nresult = hub_steps.{step}({arguments})", **values)

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
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"kind": kinds, "message": str(error), "trace": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
