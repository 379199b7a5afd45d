"""`samoe app`: which model runs where none is named, and where the page is served."""

import io
import os
import signal
import socket
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from samoe_hf import SamoeModel
from samoe_hf.app.session import TrackingSession
from samoe_hf.app.uploads import Limits, open_kept
from samoe_hf.commands.app import TINY, default_model, parse_arguments, run
from samoe_hf.errors import InputError


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def hub(monkeypatch):
    """What stands for the Hub, its cache, and somebody at a terminal, who gives an `answer`."""
    state = SimpleNamespace(cached=[], answer="", asked=[], downloaded=[], error=None, said=Terminal())

    def model_info(*_, **__):
        if state.error is not None:
            raise state.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors", size=156_000_000)])

    def ask(question):
        state.asked.append(question)
        if state.answer is None:
            raise EOFError
        return state.answer

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda _, name: name if name in state.cached else None
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(model_info=model_info))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: state.downloaded.append(names))
    monkeypatch.setattr("huggingface_hub.utils.enable_progress_bars", lambda: None)
    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("samoe_hf.commands.app.sys", SimpleNamespace(stdin=Terminal(), stderr=state.said))
    return state


def test_tiny_runs_where_it_was_downloaded_before(hub):
    hub.cached = ["config.json", "model.safetensors"]
    assert default_model(on_cpu=True) == TINY and not hub.asked


@pytest.mark.parametrize("answer,runs", [("y", TINY), ("Yes", TINY), ("", None), ("n", None), (None, None)])
def test_on_a_terminal_one_is_asked_whether_to_download_it(hub, answer, runs):
    hub.cached, hub.answer = ["config.json"], answer
    assert default_model(on_cpu=True) == runs and len(hub.asked) == 1
    assert bool(hub.downloaded) is (runs is not None)
    said = hub.said.getvalue()
    assert "156 MB" in said and "seconds" in said and "drawn videos" in said


@pytest.mark.parametrize("where", ["no terminal", "offline", "no network"])
def test_elsewhere_the_small_model_runs(hub, monkeypatch, where):
    hub.answer = "y"
    if where == "no terminal":
        monkeypatch.setattr("samoe_hf.commands.app.sys.stdin", io.StringIO())
    elif where == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        hub.error = ConnectionError("no network")
    assert default_model(on_cpu=False) is None and not hub.asked
    assert ("no network. The small model" in hub.said.getvalue()) is (where == "no network")


def test_a_host_and_a_port_that_cannot_be_served_are_named(serve, small_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for place in ({"port": port}, {"host": "no.such.host.invalid"}, {"host": "203.0.113.7"}, {"port": 70_000}):
            with (
                pytest.raises(InputError, match="The page cannot be served at host"),
                serve([small_model], Limits(), **place),
            ):
                pass


def test_a_taken_port_makes_way_and_gradios_variables_are_read(serve, small_model, monkeypatch, tmp_path):
    from gradio import http_server

    monkeypatch.setenv("GRADIO_SERVER_NAME", "localhost")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    without_proxy = os.environ.get("no_proxy")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(http_server, "INITIAL_PORT_VALUE", taken.getsockname()[1])
        with serve([small_model], Limits()) as app:
            host, port = app.url.rstrip("/").rpartition("/")[2].split(":")
            assert host == "localhost" and 0 < int(port) - taken.getsockname()[1] < 100
            assert app.folder.parent == tmp_path / "uploads"
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "uploads") and os.environ.get("no_proxy") == without_proxy


def test_models_of_one_name_are_told_apart(serve, small_model):
    with serve([small_model, small_model], Limits()) as app:
        assert list(app.models) == ["nano", "nano-2"] == [one.name for one in app.models.values()]


def test_where_the_page_is_served_is_said_when_it_is(serve, small_model, capsys, monkeypatch):
    from samoe_hf.app.server import until_stopped

    monkeypatch.setattr("samoe_hf.app.server.signal.signal", lambda *_: None)
    monkeypatch.setattr("samoe_hf.app.server.threading.Event.wait", lambda *_: True)
    with pytest.raises(InputError):
        until_stopped(serve([small_model], Limits(), host="203.0.113.7"))
    assert "served at http" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--port", "x"], ["--upload-limit", "0"], ["--push", "a/b"], ["--space", "s", "--data", "d"]]
)
def test_options_that_do_not_fit_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(words)
    assert words[0] in capsys.readouterr().err


def test_the_page_computes_in_the_type_and_compiled(model_folder, small_video, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="needs the `app` extra")
    served, compiled = [], []
    monkeypatch.setattr(SamoeModel, "compile_for_tracking", lambda model: compiled.append(model))
    monkeypatch.setattr("samoe_hf.app.server.serving", lambda loaded, *_, **__: served.extend(loaded))
    monkeypatch.setattr("samoe_hf.app.server.until_stopped", lambda _: None)
    options = ["--compare", str(model_folder), "--dtype", "bfloat16", "--compile", "--device", "cpu"]
    run(parse_arguments([str(model_folder), *options]))
    assert [loaded.model.dtype for loaded in served] == [torch.bfloat16] * 2 and len(compiled) == 2
    session = TrackingSession(tmp_path / "session", open_kept("small", small_video, Limits()), served[0], Limits())
    session.click(session.add_object(), 0, 20, 20)
    tracked = list(session.propagate())
    assert len(tracked) == session.num_frames


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_the_page_is_closed_in_order_also_with_its_terminal(monkeypatch):
    from samoe_hf.app.server import until_stopped

    handlers, page = {}, MagicMock()
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    for action in (signal.SIG_IGN, signal.SIG_DFL):
        monkeypatch.setattr(signal, "getsignal", lambda _, action=action: action)
        ending = signal.SIGTERM if action == signal.SIG_IGN else signal.SIGHUP  # `nohup` has it ignored
        page.__enter__.side_effect = lambda ending=ending: (handlers[ending](), page)[1]
        handlers.clear()
        until_stopped(page)
        assert (signal.SIGHUP in handlers) == (ending == signal.SIGHUP)
    assert page.__exit__.call_count == 2
