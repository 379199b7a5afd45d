"""Open a page that tracks objects in videos, shows the experts, and learns from what was corrected.

    samoe app                                  # SAM 2.1's tiny, or the small model that comes with the package
    samoe app MODEL --compare OTHER --data my_videos
    samoe app MODEL --space DIR                # writes a Hugging Face Space that runs it
    samoe app MODEL --space DIR --push me/my-space

Without a MODEL, facebook/sam2.1-hiera-tiny runs if it was downloaded before; on a terminal you are asked whether it
shall be. The small model needs no download, and knows drawn videos and little more.

It is served to this machine alone, unless `--host` or `--share` opens it to others. What options do not say, Gradio's
environment variables do, such as GRADIO_SERVER_NAME and GRADIO_SERVER_PORT. Corrected videos are collected in the
folder `--data`, which `samoe adapt` and `load_videos` read. Without it nothing can be learned on the page. With
`--models` alone, domains can be taken from others, and models with changed domains be saved in that folder.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from samoe_hf.errors import InputError, input_errors

from . import options

TINY, WEIGHTS = "facebook/sam2.1-hiera-tiny", "model.safetensors"
CORE_SECONDS = 15  # of one CPU core for a frame, see docs/speed.md


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.command_parser("app", __doc__)
    model = parser.add_argument_group("model")
    help_text = "by default SAM 2.1's tiny if it is there, or the small one of the package"
    model.add_argument("model", nargs="?", metavar="MODEL", help=help_text)
    help_text = "another model to compare with; may be repeated"
    model.add_argument("--compare", action="append", default=[], metavar="MODEL", help=help_text)
    options.add_original_options(model)
    options.add_memory_option(model)
    options.add_unknown_option(model)
    learning = parser.add_argument_group("learning")
    learning.add_argument("--data", type=Path, metavar="DIR", help="collect corrected videos here; allows learning")
    help_text = "for models that are learned, or saved with other domains; DATA_models if not given"
    learning.add_argument("--models", type=Path, metavar="DIR", help=help_text)
    server = parser.add_argument_group("server")
    server.add_argument("--host", metavar="NAME", help="0.0.0.0 for all networks (127.0.0.1)")
    server.add_argument("--port", type=int, metavar="N", help="(the first free one from 7860 on)")
    help_text = "also open it to the internet, by a link of Gradio's"
    server.add_argument("--share", action="store_true", default=None, help=help_text)
    server.add_argument("--upload-limit", type=int, default=512, metavar="MB", help="of a file (%(default)s)")
    server.add_argument("--frame-limit", type=int, default=30_000, metavar="N", help="of a video (%(default)s)")
    server.add_argument("--people-limit", type=int, default=32, metavar="N", help="at once (%(default)s)")
    space = parser.add_argument_group("Hugging Face Space")
    space.add_argument("--space", type=Path, metavar="DIR", help="write a Space here instead; a new folder")
    space.add_argument("--wheel", type=Path, metavar="FILE.whl", help="of this package, to put into the Space")
    space.add_argument("--push", metavar="OWNER/NAME", help="upload the Space, with the token of `hf auth login`")
    options.add_tracking_options(parser)
    parsed = parser.parse_args(arguments)
    if parsed.space is None and (parsed.wheel or parsed.push):
        parser.error("--wheel and --push go with --space")
    of_space, plain = {"model", "space", "wheel", "push", "traceback"}, vars(parser.parse_args([]))
    for name, value in vars(parsed).items():
        option = f"--{name.replace('_', '-')}"
        if name.endswith("_limit") and value < 1:
            parser.error(f"{option} must be at least 1, got {value}")
        if parsed.space is not None and name not in of_space and value != plain[name]:
            parser.error(f"{option} does not go with --space, whose page takes none of it along")
    return parsed


def run(parsed: argparse.Namespace) -> None:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if parsed.space is None:
        return serve_page(parsed)
    from samoe_hf.app.space import push_space, write_space

    with input_errors():
        write_space(parsed.space, parsed.model, parsed.wheel)
        print(f"Written: a Space in {parsed.space}")
        if parsed.push:
            print(f"Uploaded: {push_space(parsed.space, parsed.push)}")


def serve_page(parsed: argparse.Namespace) -> None:
    """Serves the page until the process is stopped."""
    if not (port := os.environ.get("GRADIO_SERVER_PORT", "7860")).isdigit():
        raise InputError(f"GRADIO_SERVER_PORT must be a number, got {port!r}.")
    try:
        from samoe_hf.app.server import serving, until_stopped
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise InputError("`samoe app` needs Gradio: pip install 'samoe_hf[app]'") from error
    from samoe_hf.app.models import load_model, small_model
    from samoe_hf.app.uploads import Limits

    original = {"experts": parsed.experts, "original_config": parsed.config}
    source = parsed.model or default_model(parsed.device.type == "cpu")
    with input_errors():
        own = options.tracking_options(parsed)
        first = load_model(source, parsed.device, **original, **own) if source else small_model(parsed.device, **own)
        loaded = [first, *(load_model(other, parsed.device, **own) for other in parsed.compare)]
    limits = Limits(upload_bytes=parsed.upload_limit * 2**20, frames=parsed.frame_limit, sessions=parsed.people_limit)
    data = parsed.data
    models = parsed.models or (data and data.with_name(f"{data.name}_models"))
    until_stopped(serving(loaded, limits, data, models, host=parsed.host, port=parsed.port, share=parsed.share))


def default_model(on_cpu: bool) -> str | None:
    """The model that runs where none is named: SAM 2.1's tiny if it was downloaded, or is now; None: the small one.

    Whether it shall be downloaded is asked on a terminal alone.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import enable_progress_bars

    if all(isinstance(try_to_load_from_cache(TINY, name), str) for name in ("config.json", WEIGHTS)):
        return TINY
    if constants.HF_HUB_OFFLINE or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    try:
        with input_errors(TINY):
            files = HfApi().model_info(TINY, files_metadata=True, timeout=10).siblings or []
        size = next(file.size for file in files if file.rfilename == WEIGHTS) or 0
        seconds = max(1, round(CORE_SECONDS / (os.cpu_count() or 1)))
        speed = f" On this machine's CPU a frame will take some {seconds} seconds." if on_cpu else ""
        print(
            f"{TINY} tracks what you click on in any video. It is a download of {size / 1e6:.0f} MB.{speed}\n"
            "The small model of this package needs none, and knows drawn videos and little more.",
            file=sys.stderr,
        )
        if input("Download it? [y/N] ").strip().lower() not in ("y", "yes"):
            return None
        enable_progress_bars()
        with input_errors(TINY):
            hf_hub_download(TINY, WEIGHTS)
        return TINY
    except (InputError, EOFError) as error:
        reason = str(error).rstrip(".") or "There was no answer"
        print(f"{reason}. The small model of this package runs.", file=sys.stderr)
        return None
