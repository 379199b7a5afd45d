"""Prints the help of commands, and fails if that imports PyTorch or transformers."""

import sys

from samoe_hf.cli import main

for command in ([], *([name] for name in sys.argv[1:])):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0, command
imported = {"torch", "transformers", "numpy"} & sys.modules.keys()
assert not imported, f"{command} imports {imported}"
