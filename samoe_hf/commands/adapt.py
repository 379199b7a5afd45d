"""Add a domain to a model: train new experts for it, and let the gate learn which videos are its.

    samoe adapt MODEL --domain ultrasound --dataset my_videos --output DIR
    samoe adapt MODEL --domain ultrasound --dataset RUN.yaml --output DIR --num_experts 4 --learning_rate 2e-4

`my_videos` is a folder of videos and masks, which are trained on as `adapt.yaml` of the package says. Of three or more,
a fifth (`--eval-fraction`) is kept aside and tracked by the base and by the new domain: the command says what was won.
Of fewer, it says this of those that were trained on. A run is as for `samoe train`, a YAML file or the name of one that
comes with the package: the new experts are trained on its `train_data`. Its other keys, which `samoe train --help`
lists, are options here too. The videos of its `eval_data`, of old domains as well, are tracked before and after.
Nothing of the model changes but what is new. DIR gets what was trained, all experts and the gate, which
`SamoeModel.from_pretrained` loads and `push_to_hub` shares; adaptation.json with the scores; and adaptation.png with
the videos that were kept aside, or trained on.
"""

import argparse
import os
from collections.abc import Sequence

from samoe_hf.data.configs import names_config, shipped_configs
from samoe_hf.errors import InputError, did_you_mean

from .options import add_output_option, check_outside, command_parser

AUTO, DEFAULT_BUDGET = "auto", "4MB"
# Keys of a run that have other words here.
OPTIONS_OF_KEYS = {
    "output_dir": "--output",
    "model_name_or_path": "MODEL",
    "domain": "--domain",
    "domain_like": "--like",
    "former": "--former",
}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with further ones of the run in `overrides`."""
    parser = command_parser("adapt", __doc__)
    parser.add_argument("model", metavar="MODEL", help="a SamoeModel, SAM 2 video, SAM 3, EdgeTAM, or an original .pt")
    videos = parser.add_argument_group("videos")
    help_text = "a folder of videos and masks; one dataset as in a run; or a run, see `samoe train`"
    videos.add_argument("--dataset", required=True, metavar="FOLDER|RUN.yaml|{kind: ...}", help=help_text)
    domain = parser.add_argument_group("domain")
    domain.add_argument("--domain", required=True, metavar="NAME", help="the new domain; one that is there goes on")
    help_text = "start from the experts of a domain; auto: those that track the training videos best (%(default)s)"
    domain.add_argument("--like", metavar="auto|none|DOMAIN", default="auto", help=help_text)
    help_text = "the experts' rank; auto: train a high one, and keep of each layer what matters (the run's)"
    domain.add_argument("--lora_rank", "--lora-rank", metavar="N|auto", help=help_text)
    help_text = f"with `--lora_rank auto`: what the experts may have on disk, such as 500kB ({DEFAULT_BUDGET})"
    domain.add_argument("--budget", metavar="SIZE", help=help_text)
    help_text = "the domain that experts of no domain become, such as those of a SAM2-MoE checkpoint (former)"
    domain.add_argument("--former", metavar="NAME", help=help_text)
    add_output_option(parser, "folder for the new model")
    parsed, parsed.overrides = parser.parse_known_args(arguments)
    if parsed.budget is not None and parsed.lora_rank != AUTO:
        raise InputError("`--budget` goes with `--lora_rank auto`, which chooses ranks within it.")
    for word in parsed.overrides:
        option = OPTIONS_OF_KEYS.get(word.partition("=")[0].removeprefix("--").replace("-", "_"))
        if word.startswith("--") and option is not None:
            raise InputError(f"`{word.partition('=')[0]}` is given by `{option}` here.")
    return parsed


def run(parsed: argparse.Namespace) -> None:
    from samoe_hf.continual.adapt import PICTURE, RESULTS_FILE, SIZES_PICTURE, adapt
    from samoe_hf.data.registry import parse_yaml
    from samoe_hf.one_writer import is_first_process
    from samoe_hf.training.arguments import parse_size

    like = None if parsed.like == "none" else parsed.like
    is_run, data = names_config(parsed.dataset), parsed.dataset
    if not (is_run or data.startswith("{") or os.path.exists(data)):
        runs = [name for name in shipped_configs() if not name.startswith("model_")]
        raise InputError(f"`--dataset` {data} is neither a folder here nor a run{did_you_mean(data, runs)}")
    if os.path.isdir(data):
        check_outside(parsed.output, data)
    if data.startswith("{"):
        parse_yaml(data, f"`--dataset` {data}")
    of_dataset = [data] if is_run else [str(shipped_configs()["adapt"]), "--train_data", data]
    former = [] if parsed.former is None else ["--former", parsed.former]
    budget = None
    if parsed.lora_rank == AUTO:
        budget = parse_size(parsed.budget or DEFAULT_BUDGET, "--budget", "of experts such as 4MB")
        if parsed.budget is None and is_first_process():
            print(f"The experts may have {DEFAULT_BUDGET}; `--budget` says otherwise.")
    rank = [] if parsed.lora_rank in (None, AUTO) else ["--lora_rank", parsed.lora_rank]
    words = [*of_dataset, *former, *rank, *parsed.overrides]
    try:
        result = adapt(parsed.model, parsed.domain, words, parsed.output, like, budget)
    except InputError as error:
        if "`output_dir`" not in str(error):
            raise
        raise InputError(str(error).replace("`output_dir`", "`--output`")) from error
    if not is_first_process():
        return
    print(result.describe())
    is_drawn = result.kept_aside or result.trained_on
    files = [RESULTS_FILE, *([PICTURE] if is_drawn else []), *([SIZES_PICTURE] if result.sizes else [])]
    print(f"Written: the model, {', '.join(files)} in {parsed.output}")
