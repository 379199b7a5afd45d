"""`AutoConfig`, `AutoModel` and `AutoProcessor` know the types of this package, and nothing is imported for it.

transformers has tables of names: what a configuration of type "samoe" is called, and its model. The class of a name is
looked up in the module `transformers.models.samoe` when it is asked for. So the names are put into these tables when
their modules are imported, and `samoe_hf` stands in for that module, since it imports its names at their first use.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

MODEL_TYPE = "samoe"
# Module of transformers -> its table of names, and what it is called there.
TABLES = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING_NAMES", "SamoeConfig"),
    "transformers.models.auto.modeling_auto": ("MODEL_MAPPING_NAMES", "SamoeModel"),
    "transformers.models.auto.processing_auto": ("PROCESSOR_MAPPING_NAMES", "Sam2VideoProcessor"),
}


class _TableLoader(SourceFileLoader):
    """Runs a module of [`TABLES`], and adds the name of this package's type to its table."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        table, name = TABLES[module.__name__]
        getattr(module, table)[MODEL_TYPE] = name
        sys.modules[f"transformers.models.{MODEL_TYPE}"] = sys.modules["samoe_hf"]


class _TableFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _TableLoader(fullname, spec.origin)
        return spec


def register() -> None:
    """Makes the types known: at once if transformers has its tables already, else when it imports them."""
    if not TABLES.keys() & sys.modules.keys():
        sys.meta_path.insert(0, _TableFinder())
        return
    from transformers import AutoConfig, AutoModel, AutoProcessor, Sam2VideoProcessor

    package = sys.modules["samoe_hf"]
    AutoConfig.register(MODEL_TYPE, package.SamoeConfig, exist_ok=True)
    AutoModel.register(package.SamoeConfig, package.SamoeModel, exist_ok=True)
    AutoProcessor.register(package.SamoeConfig, Sam2VideoProcessor, exist_ok=True)
