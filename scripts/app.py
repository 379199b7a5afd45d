"""`samoe app`; `--help` explains it."""

from samoe_hf.cli import run_command

if __name__ == "__main__":
    run_command("app")
