"""What `saev.data.ordered` has."""

from saev_torch.config import OrderedConfig as Config
from saev_torch.loaders import OrderedDataLoader as DataLoader

__all__ = ["Config", "DataLoader"]
