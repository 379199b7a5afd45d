"""Kills commands at random moments, or starts two at once, and compares what they leave with an undisturbed run.

    python kill_commands.py FOLDER [--kills 100] [--pairs 20] [--seed 0] [--commands label evaluate adapt train track]

Each command is forked from this process, which has all modules loaded. One line is printed of each, and a table at the
end; the status is 1 if anything differs.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

from samoe_hf import cli, small_base
from samoe_hf.continual import adapt, assemble  # noqa: F401 (loaded before the forks)
from samoe_hf.data import SyntheticVideos, read_video, write_palette_png
from samoe_hf.evaluation import report, run  # noqa: F401
from samoe_hf.training.checkpoints import list_checkpoints

REFUSED = ("is being written by another process", "holds another run", "exists; give another")
TRAINING = {
    "num_frames": 2, "max_objects": 1, "per_device_train_batch_size": 1, "max_steps": 3, "save_strategy": "steps",
    "save_steps": 1, "save_total_limit": 2, "eval_strategy": "no", "logging_steps": 1, "max_initial_frames": 1,
    "max_corrected_frames": 0, "disable_tqdm": "true", "report_to": "none", "use_cpu": "true",
}  # fmt: skip


def words_of(command: str, data: Path, output: Path) -> list[str]:
    base, training = small_base(), [f"--{name}={value}" for name, value in TRAINING.items()]
    words = {
        "label": ["label", base, "--dataset", data, "--output", output, "--device", "cpu"],
        "evaluate": ["evaluate", base, "--dataset", data, "--output", output, "--device", "cpu"],
        "track": ["track", base, data / "v0" / "frames", "--box", "10,10,40,40", "--output", output / "out.mp4",
                  "--device", "cpu"],
        "adapt": ["adapt", base, "--domain", "d", "--dataset", data, "--output", output, "--num_experts", 2,
                  "--num_experts_per_tok", 1, *training],
        "train": ["train", data.parent / "run.yaml", "--output_dir", output, *training],
    }  # fmt: skip
    return list(map(str, words[command]))


def write_data(folder: Path) -> Path:
    videos = SyntheticVideos(4, 4, (64, 64), domain="shapes", seed=1)
    for number, video in enumerate(videos):
        for kind in ("frames", "masks"):
            (folder / "data" / f"v{number}" / kind).mkdir(parents=True)
        for t, frame in enumerate(video.frames):
            Image.fromarray(np.ascontiguousarray(frame)).save(folder / "data" / f"v{number}" / "frames" / f"{t}.png")
            write_palette_png(folder / "data" / f"v{number}" / "masks" / f"{t}.png", video.id_map(t))
    (folder / "run.yaml").write_text(f"model_name_or_path: {small_base()}\ntrain_data: ['{folder / 'data'}']\n")
    return folder / "data"


def start(words: list[str], log: Path) -> int:
    """Forks a command; what it prints goes to `log`."""
    if child := os.fork():
        return child
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.argv = ["samoe", *words]
    code = 0
    try:
        cli.main(words)
    except SystemExit as error:
        code = 1
        print(error.code)
    except BaseException as error:
        code = 2
        print(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    os._exit(code)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def names_of(folder: Path) -> set[str]:
    return {os.path.join(where, name) for where, folders, files in os.walk(folder) for name in [*folders, *files]}


def kill_at_random(child: int, output: Path, seconds: float, rng: random.Random) -> bool:
    """Kills a command after up to so many seconds, or when it writes the next file after that; whether it still ran."""
    end, at_a_write = time.monotonic() + seconds * rng.random(), rng.random() < 0.6
    before = None
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            names = names_of(output) if at_a_write else set()
            if not at_a_write or (before is not None and names != before):
                time.sleep(rng.random() * 0.004)
                os.kill(child, signal.SIGKILL)
                return finish(child) == -signal.SIGKILL
            before = names
        time.sleep(0.0005)
    return False


def contents(command: str, output: Path) -> dict:
    """What a command is for: masks, scores or tensors, and nothing that depends on the time."""
    if command in ("label", "track"):
        written = sorted([*output.rglob("*.png"), *output.rglob("*.csv")])
        found = {str(path.relative_to(output)): path.read_bytes() for path in written}
        # An encoder of several threads does not write the same bytes each time.
        return found | {path.name: len(read_video(path)) for path in output.glob("*.mp4")}
    if command == "evaluate":
        results = json.loads((output / "results.json").read_text())["models"][0]
        masks = {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("masks/**/*.png"))}
        return masks | {"objects": results["objects"], "summary": results["summary"]}
    tensors = {}
    for path in [output / "model.safetensors", *output.glob("domains/*.safetensors")]:
        with safe_open(path, framework="np") as file:
            tensors |= {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    config = json.loads((output / "config.json").read_text())
    results = (output / "adaptation.json").read_text() if command == "adapt" else ""
    return tensors | {"config": config, "results": results}


def complete(command: str, data: Path, output: Path, log: Path) -> str:
    """Runs a command to its end, as its user would after a kill; what it said where it was refused."""
    words = words_of(command, data, output)
    if command in ("adapt", "train") and list_checkpoints(output):
        words += ["--resume_from_checkpoint", "last"]
    code, text = finish(start(words, log)), log.read_text()
    if code == 2:
        return f"no error of its own: {text.strip().splitlines()[-1]}"
    # A command that was killed after its last file is refused, since all is there.
    return "" if code == 0 or any(known in text for known in REFUSED[1:]) else text.strip().splitlines()[-1]


def run_pair(words: list[str], folder: Path, delay: float) -> list[bool]:
    """Starts a command twice; whether each was refused, as one of them must be that came while the other wrote."""
    logs, children = [folder / f"log_{one}.txt" for one in range(2)], []
    for log in logs:
        children.append(start(words, log))
        time.sleep(delay)
    codes, texts = list(map(finish, children)), [log.read_text() for log in logs]
    refused = [code == 1 and any(known in text for known in REFUSED) for code, text in zip(codes, texts, strict=True)]
    assert all(code == 0 or is_refused for code, is_refused in zip(codes, refused, strict=True)), texts
    return refused


def leftovers(output: Path) -> list[str]:
    names = [name for name in names_of(output.parent) if name.startswith(str(output)) or f"/.{output.name}" in name]
    return [name for name in names if "/_" in name or "/." in name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", default=["label", "evaluate", "adapt", "train", "track"])
    parsed = parser.parse_args()
    rng, folder = random.Random(parsed.seed), parsed.folder.absolute()
    data, log, counts, wrong = write_data(folder), folder / "log.txt", Counter(), []
    expected, seconds = {}, {}
    for command in parsed.commands:
        begin = time.monotonic()
        problem = complete(command, data, folder / f"whole_{command}", log)
        seconds[command] = time.monotonic() - begin
        assert not problem, (command, problem)
        expected[command] = contents(command, folder / f"whole_{command}")

    def check(command: str, output: Path, what: str) -> None:
        problem = complete(command, data, output, log)
        if not problem:
            try:
                problem = "" if contents(command, output) == expected[command] else "it is another result"
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        if not problem and (left := leftovers(output)):
            problem = f"left over: {left}"
        if problem:
            wrong.append(f"{what} {command} {output.name}: {problem}")
            print("WRONG", wrong[-1], flush=True)
        else:
            shutil.rmtree(output)

    commands, begin = itertools.cycle(parsed.commands), time.monotonic()
    while sum(number for (_, what), number in counts.items() if what == "killed") < parsed.kills:
        command, output = next(commands), folder / f"cut_{sum(counts.values())}"
        for _ in range(rng.randint(1, 3)):
            words = words_of(command, data, output)
            if command in ("adapt", "train") and list_checkpoints(output):
                words += ["--resume_from_checkpoint", "last"]
            counts[command, "killed"] += kill_at_random(start(words, log), output, 1.1 * seconds[command], rng)
        counts[command, "rounds"] += 1
        check(command, output, "killed")
    for number in range(parsed.pairs):
        command, output = next(commands), folder / f"pair_{number}"
        for refused in run_pair(words_of(command, data, output), folder, rng.random() ** 2 * seconds[command]):
            counts[command, "refused" if refused else "ended"] += 1
        check(command, output, "pair")
    print(f"{time.monotonic() - begin:.0f} s")
    for command in parsed.commands:
        found = {what: counts[command, what] for what in ("killed", "rounds", "ended", "refused")}
        print(f"{command:10s} {found}", flush=True)
    print(f"{len(wrong)} differ")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
