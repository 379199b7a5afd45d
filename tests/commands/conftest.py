import pytest

from helpers.reference import ROOT
from samoe_hf.cli import main


@pytest.fixture
def leave_out_pictures(monkeypatch):
    """After its call, evaluations draw neither objects nor plots."""

    def leave_out() -> None:
        for name in ("run.draw_object", "report.plot_over_time", "report.plot_by_size"):
            monkeypatch.setattr(f"samoe_hf.evaluation.{name}", lambda *_: None)

    return leave_out


@pytest.fixture
def samoe(monkeypatch, capfd):
    """Runs `samoe ARGUMENTS` at the repository's root; returns all that it printed, or its one line of error."""

    def run(*arguments: object, fails: bool = False) -> str:
        monkeypatch.chdir(ROOT)
        if not fails:
            main([*map(str, arguments)])
            return "".join(capfd.readouterr())
        with pytest.raises(SystemExit) as caught:
            main([*map(str, arguments)])
        message = caught.value.code
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
        return message

    return run
