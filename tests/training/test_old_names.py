"""Words of SAM2-MoE's and Meta's trainers are answered with what they are called here."""

import json
import re

import pytest
import yaml

from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.cli import run_command
from samoe_hf.data.transforms import transforms_from_options
from samoe_hf.model.configuration_samoe import OLD_EXPERT_SETTINGS
from samoe_hf.training.arguments import SamoeTrainingArguments, parse_run, run_parser
from samoe_hf.training.old_names import OLD_NAMES

KNOWN = {action.dest for action in run_parser()._actions}


@pytest.fixture
def run(tmp_path):
    """A run with further lines of YAML."""

    def write(*lines: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text("\n".join(["train_data: [{kind: synthetic}]", f"output_dir: {tmp_path / 'out'}", *lines]))
        return str(path)

    return write


def test_the_table_names_keys_that_are_there():
    named = {key for text in OLD_NAMES.values() for key in re.findall(r"`(\w+)`", text)}
    assert named - {"split", "root"} <= KNOWN
    assert not OLD_NAMES.keys() & KNOWN
    assert set(OLD_EXPERT_SETTINGS.values()) <= set(SamoeConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    "line, message",
    [
        ("num_epochs: 3", "has an unknown key 'num_epochs'. Here it is `num_train_epochs`."),
        ("batch_size: 4", "Here it is `per_device_train_batch_size`."),
        ("top_k: 2", "Here it is `num_experts_per_tok`."),
        ("config_file: a.yaml", "Here it is `config`."),
        ("ckpt_path: a.pt", "Here it is `model_name_or_path`."),
        ("use_dummy_data: true", "train_data: [{kind: synthetic}]"),
        ("prob_to_use_pt_input_for_train: 0.5", "Here it is `point_probability`."),
        ("scratch: {num_frames: 8}", "Here it is no section"),
        ("learning_rat: 1", "Did you mean 'learning_rate'?"),
        ("xyzzy: 1", "has an unknown key 'xyzzy'."),
    ],
)
def test_keys_of_the_yaml(run, line, message):
    with pytest.raises(ValueError) as error:
        parse_run([run(line)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch_size", "4"], "There is no option --batch_size. Here it is --per_device_train_batch_size."),
        (["--num-epochs=4"], "There is no option --num-epochs. Here it is --num_train_epochs."),
        (["--lr", "1e-4"], "There is no option --lr. Here it is --learning_rate."),
        (["--rank", "4"], "Here it is --lora_rank."),
        (["--use_dummy_data"], "Here it is train_data: [{kind: synthetic}] in the YAML"),
        (["--learning_rat", "1"], "There is no option --learning_rat. Did you mean --learning_rate?"),
        (["--xyzzy"], "There is no option --xyzzy."),
    ],
)
def test_options_of_train_and_adapt(run, tmp_path, options, message):
    path = run()
    adapt = [str(tmp_path), "--domain", "a", "--dataset", path, "--output", str(tmp_path / "new")]
    for command, arguments in (("train", [path, *options]), ("adapt", [*adapt, *options])):
        with pytest.raises(SystemExit) as error:
            run_command(command, arguments)
        assert message in str(error.value.code)


def test_options_that_are_there_pass(run):
    *_, arguments = parse_run([run(), "--learning-rate", "1e-3", "--seed=3", "--no_save_only_trained"])
    assert (arguments.learning_rate, arguments.seed, arguments.save_only_trained) == (1e-3, 3, False)


def test_python(tmp_path):
    with pytest.raises(TypeError, match=r"no argument 'num_epochs'\. Here it is `num_train_epochs`"):
        SamoeTrainingArguments(output_dir=tmp_path, num_epochs=3)
    for settings in ({"top_k": 2}, {"alpha": 1.0}, {"rank": 4}):
        (old,) = settings
        with pytest.raises(ValueError, match=f"`{old}` is called `{OLD_EXPERT_SETTINGS[old]}` here"):
            SamoeConfig(**settings)
        with pytest.raises(ValueError, match=f"`{old}` is called"):
            SamoeModel.from_pretrained("a", **settings)
    with pytest.raises(ValueError, match="`ckpt_path` is called `pretrained_model_name_or_path` here"):
        SamoeModel.from_pretrained(ckpt_path="a.pt")
    with pytest.raises(ValueError, match="`config_file` is called `original_config` here"):
        SamoeModel.from_pretrained("a.pt", config_file="a.yaml")
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` must be given"):
        SamoeModel.from_pretrained()


def test_a_configuration_with_keys_of_others_loads(tmp_path):
    SamoeConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "top_k": 50, "somebody": "else"}))
    config = SamoeConfig.from_pretrained(tmp_path)
    assert (config.somebody, config.num_experts_per_tok) == ("else", 2)
    with pytest.raises(ValueError, match="`top_k` is called"):
        SamoeConfig.from_pretrained(tmp_path, top_k=3)
    config.save_pretrained(tmp_path / "again")


def test_what_the_table_says_of_augmentation_is_taken():
    for name in ("horizontal_flip", "color_jitter", "random_crop"):
        options = yaml.safe_load(OLD_NAMES[name].split(" in the YAML")[0].replace("…", "0.2"))["augmentation"]
        transforms_from_options(options)
