"""Python imports this when it starts. What `import torch` makes is left out of garbage collections, the last ones too.

They would take half of the time of a short program, and tests start some hundred.
"""

import gc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Torch:
    """Finds torch as Python would, and imports it so."""

    @staticmethod
    def find_spec(name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(_Torch)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_without(module: ModuleType) -> None:
                gc.disable()
                try:
                    execute(module)
                finally:
                    gc.freeze()
                    gc.enable()

            spec.loader.exec_module = execute_without
        return spec


sys.meta_path.insert(0, _Torch)
