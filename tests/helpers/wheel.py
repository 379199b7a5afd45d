"""The package's wheel and its source distribution, built from a copy of the sources."""

import shutil
import subprocess
import sys
from pathlib import Path

from helpers.reference import ROOT

BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist'); build_meta.build_sdist('dist')"


def build_wheel(folder: Path) -> Path:
    """Builds both in an empty folder; returns the wheel's path."""
    (folder / "tests").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "tests/test_house.py"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "samoe_hf", folder / "samoe_hf", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, check=True, capture_output=True)
    (path,) = (folder / "dist").glob("*.whl")
    return path
