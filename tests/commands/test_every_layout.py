"""Every command that takes data, on every kind of layout: it works, or says in a line why not."""

from pathlib import Path

import pytest

from helpers import layouts
from helpers.own_videos import LAYOUTS, write
from helpers.reference import ROOT
from samoe_hf import small_base
from samoe_hf.cli import main

RUN = ["--num_frames", "2", "--max_objects", "1", "--num_correction_clicks", "0", "--max_steps", "1", "--use_cpu"]
RUN += ["--per_device_train_batch_size", "1", "--save_strategy", "no", "--report_to", "none"]
NANO = ["--model_config", str(ROOT / "configs" / "model_nano.yaml")]
COMMANDS = {
    "check": ["data", "check", "DATA"],
    "evaluate": ["evaluate", "MODEL", "--dataset", "DATA", "--device", "cpu"],
    "label": ["label", "MODEL", "--dataset", "DATA", "--device", "cpu"],
    "experts": ["experts", "MODEL", "--dataset", "DATA", "--device", "cpu"],
    "train": ["train", "smoke", "--train_data", "DATA", "--eval_data", "DATA", *NANO, *RUN],
    "adapt": ["adapt", small_base(), "--domain", "mine", "--dataset", "DATA", *RUN],
}


def splits(kind):
    """A public layout with a folder for each split."""

    def make(root):
        for split in ("train", "valid"):
            write(root / kind / split, "JPEGImages/{v}/{t:05d}.jpg", "Annotations/{v}/{t:05d}.png", only=1)
        return root / kind

    return make


def public(kind):
    def make(root):
        made = getattr(layouts, f"make_{kind}")(root / kind)
        for option, place in (("images", "train"), ("annotations", "train/_annotations.coco.json")):
            if option in made:  # COCO's, as it is recognized
                (root / kind / made[option]).rename(root / kind / place)
        return root / kind

    return make


KINDS = {
    kind: public(kind) for kind in ("frames", "davis", "sa_v_val", "sa_v", "ocid", "npz", "nifti", "coco", "dataset")
}
KINDS |= {kind: splits(kind) for kind in ("YouTubeVOS", "MOSE", "LVOS")}
KINDS |= {name: LAYOUTS[name] for name in ("frames_and_masks", "videos_and_masks", "object_folders", "csv", "json")}


def split_folders(root):
    for split in ("train", "val"):
        write(root, f"{split}/{{v}}/frames/{{t}}.jpg", f"{split}/{{v}}/masks/{{t}}.png")
    return root


KINDS["split_folders"] = split_folders


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_layout_ends_in_a_traceback(kind, command, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = KINDS[kind](Path("data"))
    arguments = [{"DATA": str(data), "MODEL": str(model_folder)}.get(word, word) for word in COMMANDS[command]]
    output = "--output_dir" if command == "train" else "--output"
    try:
        main([*arguments, output, "out"])
    except SystemExit as end:
        assert isinstance(end.code, str) and "\n" not in end.code
        print("REFUSED", kind, command, end.code)
    else:
        assert any(Path("out").iterdir())
