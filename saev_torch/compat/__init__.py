"""The names of `saev.data` on this package, so that code for it moves by one line: `import saev_torch.compat as data`.

    from saev.data import ShuffledConfig, ShuffledDataLoader    from saev_torch.compat import ...
    import saev.data; saev.data.shards.Metadata.load(...)       import saev_torch.compat as data; data.shards...
    from saev.data.ordered import Config, DataLoader            from saev_torch.compat.ordered import ...

Code that cannot be changed, such as a library that imports `saev.data` itself, finds these modules after `install()`.
"""

import importlib
import os
import sys
import types

from saev_torch.compat import indexed, ordered, shards, shuffled
from saev_torch.config import IndexedConfig, OrderedConfig, ShuffledConfig, make_ordered_config
from saev_torch.errors import ConfigError
from saev_torch.format.metadata import Metadata, PixelAgg
from saev_torch.indexed import IndexedDataset
from saev_torch.loaders import OrderedDataLoader, ShuffledDataLoader

__all__ = [
    "IndexedConfig",
    "IndexedDataset",
    "Metadata",
    "OrderedConfig",
    "OrderedDataLoader",
    "PixelAgg",
    "ShuffledConfig",
    "ShuffledDataLoader",
    "indexed",
    "install",
    "make_ordered_config",
    "ordered",
    "shards",
    "shuffled",
]


def install() -> None:
    """Let `import saev.data`, in this process, find these names and submodules; to be called before that.

    Where the package `saev` is installed, its other modules stay its own, those in `saev.data` too.

    Raises:
        ConfigError: The `saev.data` of that package was imported before, so that some code has its classes.
    """
    data = sys.modules.get("saev.data")
    if data is not None and getattr(data, "ShuffledConfig", None) is not ShuffledConfig:
        raise ConfigError(
            "saev_torch.compat.install: expected to be called before anything imports saev.data, got a process where "
            "that is imported; call it first."
        )
    # A module of its own, so that what it does not have is looked for, and imported, under its name.
    sys.modules["saev.data"] = data = types.ModuleType("saev.data", __doc__)
    data.__dict__.update({name: globals()[name] for name in __all__})
    for name in ("indexed", "ordered", "shards", "shuffled"):
        sys.modules[f"saev.data.{name}"] = globals()[name]
    try:
        saev = importlib.import_module("saev")
    except ModuleNotFoundError:
        # A package of which nothing else is here.
        saev = sys.modules["saev"] = types.ModuleType("saev")
        saev.__path__ = []
    data.__path__ = [os.path.join(path, "data") for path in saev.__path__]
    saev.data = data  # type: ignore[attr-defined]
