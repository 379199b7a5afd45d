"""Every command and snippet of README and guides is run as it is written, in a folder that has what they name.

They run in a process of its own, whose Hub is the test server. Small models stand for large ones, and training takes
one step; what takes hours or needs more than this machine has is listed with the reason.
"""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest

from helpers.docs_world import make_world
from helpers.hub_client import Client
from helpers.hub_server import HubServer, Repository
from helpers.reference import ROOT, load_reference
from helpers.sam3 import save_combined

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ON_THE_HUB = {"facebook/sam2.1-hiera-base-plus": "sam2", "facebook/sam3": "sam3", "someone/night-lora": "someones-lora"}
ENTER = """
import sys
sys.path.insert(0, tests)
from helpers.docs_world import enter
globals().update(enter(folder, guide))
"""
# What is not run: the beginning of a line of a shell block -> why.
NOT_RUN = {
    "make ": "sets up an environment; the continuous integration runs it",
    "samoe app": "serves until it is stopped; tests/app runs it",
    "python scripts/": "takes long, or needs a GPU and peers; tests/scripts runs them",
    "accelerate launch --num_processes 8": "needs 8 GPUs",
    "torchrun": "two processes; tests/training/test_trainer.py runs them",
}
# Statements that each start from the model as it was loaded.
FRESH = {"experts.md"}
STEPS = ["--max_steps", "1", "--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false"]
FEWER = {"train": [*STEPS, "--bf16", "false"], "adapt": STEPS}
# What must have run before a guide: its results are read there.
BEFORE = {
    "hub_and_peft.md": ["samoe evaluate MODEL --dataset npz --root CT --output outputs/ct"],
    "evaluation.md": ["samoe train configs/smoke.yaml --max_steps 1"],
    "export.md": [
        shlex.join(["samoe", "adapt", "MODEL", "--domain", "ultrasound", "--dataset", "RUN.yaml", *FEWER["adapt"]])
        + " --output outputs/ultrasound"
    ],
    "interaction.md": ["samoe track MODEL dog.mp4 --box 300,100,560,380 --output out.mp4"],
    # The run that is resumed there.
    "training.md": [shlex.join(["samoe", "train", "finetune_mose", *FEWER["train"], "--save_strategy", "epoch"])],
}


def statements(guide: Path) -> list[str]:
    """Python of all that is run of a guide, in order; a command is a call of `samoe`."""
    parts = [f"samoe({line!r})" for line in BEFORE.get(guide.name, [])]
    for language, content in BLOCK.findall(guide.read_text()):
        if language == "python" and guide.name in FRESH:
            parts += [f"model = reset()\n{ast.unparse(statement)}" for statement in ast.parse(content).body]
        elif language == "python":
            parts.append(content)
        elif language in ("", "sh", "bash"):
            parts += [f"samoe({line!r})" for line in commands(content)]
    names = {'"me/': '"tester/', " me/": " tester/", '"base_plus.pt"': '"MODEL"'}
    for name, stand_in in names.items():
        parts = [part.replace(name, stand_in) for part in parts]
    return parts


def commands(content: str) -> list[str]:
    """Commands of a shell block, with less to do."""
    lines = []
    for line in content.replace("\\\n", " ").splitlines():
        is_command = re.match(r"(samoe|accelerate|torchrun) ", line)
        if not is_command or any(line.startswith(start) for start in NOT_RUN):
            continue
        words = shlex.split(line, comments=True)
        if words[:2] == ["accelerate", "launch"]:
            # In one process, and where the run that is resumed has been.
            words = ["samoe", *words[words.index("samoe_hf") + 1 :], "--overwrite_output_dir", "true"]
        if "sam2.1_hiera_base_plus.pt" in words and "--config" not in words:
            words += ["--config", "sam2.1_hiera_b+_moe.yaml"]  # the small file has none of Meta's sizes
        if words[0] == "samoe":
            lines.append(shlex.join([*words, *FEWER.get(words[1], [])]))
    return lines


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with all that is named, and a process that reads and writes the test server's Hub."""
    folder = tmp_path_factory.mktemp("docs") / "world"
    make_world(folder, load_reference("nano").model)
    save_combined(folder / "sam3")
    with HubServer() as server:
        for name, source in ON_THE_HUB.items():
            repository = server.repositories[name] = Repository()
            repository.commit({path.name: path.read_bytes() for path in (folder / source).iterdir()})
        client = Client(server.url, folder.parent / "home")
        yield folder, client
        client.close()


@pytest.mark.slow
@pytest.mark.parametrize("guide", [guide for guide in GUIDES if statements(guide)], ids=lambda path: path.name)
def test_everything_in_it_runs(guide, world, tmp_path):
    folder, client = world
    shutil.copytree(folder, tmp_path / "here")
    code = "\n".join([ENTER, *statements(guide), "result = None"])
    client.run(code, folder=tmp_path / "here", tests=ROOT / "tests", guide=guide.name)


def test_what_is_not_run_is_there():
    """No line of the list is left over."""
    lines = "\n".join(content for guide in GUIDES for _, content in BLOCK.findall(guide.read_text()))
    for start in NOT_RUN:
        assert re.search(rf"^{re.escape(start)}", lines, flags=re.MULTILINE), start
