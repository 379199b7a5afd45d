"""Fixtures that several folders share. Slow imports are in functions, since the controller of xdist needs none."""

import atexit
import copy
import gc
import json
import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

# Most of what is imported and made stays, so the garbage collector need not look at it very often.
gc.set_threshold(20_000, 20, 20)
# Of the small models' tensors none is worth a thread.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
# transformers compiles an expression for each tensor that it loads, of which Python keeps 512.
re._MAXCACHE = 8192


def pytest_collection(session) -> None:
    """One thread: the models are small, and a fork of a process that has used several waits for them for ever."""
    is_controller = session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput")
    if not is_controller:
        import torch

        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """The garbage collector need not look at what is imported, nor pytest at each of PyTorch's 86 loggers."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries that count what is left at the end find nothing
    for name in [*logging.root.manager.loggerDict]:
        if name.startswith("torch."):
            logging.getLogger(name).propagate = True  # through the root, where pytest listens


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One process for each file, and one for the page's tests, which share an app, a browser and Gradio's import."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "app" if nodeid.startswith("tests/app/") else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session", params=["nano", "mini"])
def reference(request) -> SimpleNamespace:
    """A reference model with its experts; tests must leave it as it is."""
    import torch

    from helpers.reference import load_reference

    torch.manual_seed(0)
    return load_reference(request.param)


@pytest.fixture(scope="session")
def nano(request) -> SimpleNamespace:
    """SAM 2's small model, or another base's that a test asks for (see `over_bases`)."""
    from helpers.edgetam import edgetam_model
    from helpers.reference import load_reference

    if getattr(request, "param", None) == "edgetam":
        return SimpleNamespace(name="edgetam", model=edgetam_model(with_experts=True))
    return load_reference("nano")


def copy_model(model):
    """As `copy.deepcopy`, but the dozen of empty dictionaries in each module, as of hooks, are made at once."""
    from torch.nn import Module

    def copy_module(module, memo):
        make, arguments, state, *_ = module.__reduce_ex__(4)
        copied = memo[id(module)] = make(*arguments)
        is_empty = {name for name, x in state.items() if isinstance(x, dict) and not x}
        copied.__setstate__({n: type(x)() if n in is_empty else copy.deepcopy(x, memo) for n, x in state.items()})
        return copied

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Module, "__deepcopy__", copy_module, raising=False)
        return copy.deepcopy(model)


@pytest.fixture
def model(nano):
    """A copy of the reference model (4 experts, 2 of them for each token), free to be changed."""
    return copy_model(nano.model)


@pytest.fixture(scope="module")
def processor(nano):
    from samoe_hf.model.processing_samoe import build_processor

    return build_processor(nano.model.config)


@pytest.fixture(scope="session")
def base_folder(nano, tmp_path_factory) -> Path:
    """The reference without experts, saved as transformers' own model."""
    from peers import base_of

    folder = tmp_path_factory.mktemp("base")
    base_of(nano.model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(nano, tmp_path_factory) -> Path:
    """A saved SamoeModel and its processor; tests must leave the folder as it is."""
    from samoe_hf.model.processing_samoe import build_processor

    folder = tmp_path_factory.mktemp("nano")
    nano.model.save_pretrained(folder)
    build_processor(nano.model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> str:
    """The small base that comes with the package, for frames of 128 x 128; tests must leave the folder as it is."""
    from samoe_hf import SamoeModel, small_base
    from samoe_hf.model.processing_samoe import build_processor

    folder, model = tmp_path_factory.mktemp("small"), SamoeModel.from_pretrained(small_base(), image_size=128)
    model.save_pretrained(folder, processor=build_processor(model.config))
    return str(folder)


@pytest.fixture
def damaged_rows(tmp_path) -> Path:
    """A run's YAML of two data sets as `datasets` saves them, each with a damaged row and a good one."""
    from datasets import Dataset

    from samoe_hf.data import FEATURES, SyntheticVideos
    from samoe_hf.data.schema import video_to_row

    for number, video in enumerate(SyntheticVideos(2, 2, (64, 80))):
        bad, good = ({**video_to_row(video), "video_id": f"{name} {number}"} for name in ("bad", "good"))
        bad["frames"] = [{"bytes": b"damaged", "path": None}] * 2
        Dataset.from_list([bad, good], features=FEATURES).save_to_disk(tmp_path / f"rows_{number}")
    run = tmp_path / "rows.yaml"
    run.write_text(f"eval_data: [{tmp_path / 'rows_0'}, {tmp_path / 'rows_1'}]")
    return run


READ, BUILT = {}, {}
# Options that draw nothing; anything that is drawn is drawn anew.
READ_WITH = {"dtype", "memory_selection", "image_size"}


def files_of(source) -> list[Path]:
    """The files that a model with experts is read from, its base's too; none where they are not all in folders."""
    files = sorted(Path(source or "nowhere").glob("*"))
    try:
        config = next((json.loads(file.read_bytes()) for file in files if file.name == "config.json"), {})
        base = (config.get("base_model") or {}).get("name_or_path")
        of_base = sorted(Path(base).glob("*")) if base else files
        return [*files, *of_base] if config.get("model_type") == "samoe" and of_base else []
    except Exception:  # a damaged file, which the package names
        return []


def unless_meta(draw):
    """The same, but nothing is drawn for a tensor without memory, which takes longer than with it."""
    return lambda tensor, *args, **options: tensor if tensor.is_meta else draw(tensor, *args, **options)


@pytest.fixture(scope="module", autouse=True)
def copies():
    """A folder of a model is read once while its files are the same; further loads are copies, much faster."""
    from samoe_hf import SamoeModel

    read = SamoeModel.from_pretrained.__func__

    def from_pretrained(cls, pretrained_model_name_or_path=None, *args, **options):
        source = pretrained_model_name_or_path
        given = {name for name, value in options.items() if value is not None and value is not False}
        files = [] if args or given - READ_WITH else files_of(source)
        if not files:
            return read(cls, source, *args, **options)
        key = (
            cls,
            str(source),
            str(options),
            *((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files),
        )
        if key not in READ:
            READ[key] = read(cls, source, **options)
            if len(READ) > 12:
                del READ[next(iter(READ))]
        return copy_model(READ[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamoeModel, "from_pretrained", classmethod(from_pretrained))
        yield


@pytest.fixture(scope="module", autouse=True)
def shortcuts():
    """What tells the tensors of a configuration is built once, trainers collect no garbage, and saves do not wait for
    the disk: processes are killed here, but no plug is pulled.
    """
    from torch.nn import init
    from transformers import PreTrainedConfig
    from transformers.initialization import TORCH_INIT_FUNCTIONS

    from samoe_hf.model import weights_check
    from samoe_hf.original import checkpoint

    build = weights_check.build_on_meta

    def build_on_meta(config, with_experts=True, *cls):
        key = str(config.to_dict()), with_experts, cls
        if key not in BUILT:
            BUILT[key] = build(config, with_experts, *cls)
        return BUILT[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(PreTrainedConfig, "__repr__", object.__repr__)  # it is made for each line of a log that is off
        # Seconds that the garbage collector waits for a loader's worker, whose queue it may have ended before.
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
        patch.setattr("accelerate.utils.memory.clear_device_cache", lambda **_: None)
        for name, draw in TORCH_INIT_FUNCTIONS.items():
            patch.setitem(TORCH_INIT_FUNCTIONS, name, unless_meta(draw))
            patch.setattr(init, name, unless_meta(getattr(init, name)))
        for module in (weights_check, checkpoint):
            patch.setattr(module, "build_on_meta", build_on_meta)
        yield


@pytest.fixture(scope="module")
def clip(nano):
    """A clip of three frames (1, 3, 3, S, S) and its objects' masks (1, N, 3, S, S)."""
    frames = nano.load("train_step")
    return frames["pixel_values"][None, :3], frames["masks"].bool().transpose(0, 1)[None, :, :3]


@pytest.fixture(scope="session")
def domain_videos():
    """Videos of three looks."""
    from samoe_hf.data.synthetic import SyntheticVideos

    return {name: SyntheticVideos(24, 3, domain=name, seed=5) for name in ("shapes", "blobs", "stripes")}


@pytest.fixture(scope="session")
def gated(domain_videos):
    """A model whose gate knows blobs and stripes as domains a and b; tests must leave it as it is."""
    from helpers.domains import with_two_domains
    from samoe_hf.continual.fit_gate import fit_gate
    from samoe_hf.model.processing_samoe import build_processor

    model = with_two_domains()
    for name, kind in (("a", "blobs"), ("b", "stripes")):
        videos = [domain_videos[kind][i] for i in range(12, 24)]
        fit_gate(model, build_processor(model.config), name, videos, show_progress_bar=False)
    return model


@pytest.fixture(scope="session")
def two_clips():
    """Random frames (2, 3, 3, 128, 128) and labels of two squares."""
    import torch

    labels = torch.zeros(2, 2, 3, 128, 128, dtype=torch.bool)
    labels[:, 0, :, 10:50, 10:50] = labels[:, 1, :, 60:100, 60:110] = True
    return torch.randn(2, 3, 3, 128, 128, generator=torch.Generator().manual_seed(0)), labels
