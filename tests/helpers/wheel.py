"""The package's wheel, built from a copy of the sources."""

import shutil
import subprocess
import sys
from pathlib import Path

from helpers.reference import ROOT

BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"


def build_wheel(folder: Path) -> Path:
    """Builds it in an empty folder; returns its path."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "samoe_hf", folder / "samoe_hf", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, check=True, capture_output=True)
    (path,) = (folder / "dist").glob("*.whl")
    return path
