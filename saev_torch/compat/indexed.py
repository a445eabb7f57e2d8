"""What `saev.data.indexed` has."""

from saev_torch.config import IndexedConfig as Config
from saev_torch.indexed import IndexedDataset as Dataset

__all__ = ["Config", "Dataset"]
