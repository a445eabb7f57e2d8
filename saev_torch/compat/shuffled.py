"""What `saev.data.shuffled` has."""

from saev_torch.config import ShuffledConfig as Config
from saev_torch.loaders import ShuffledDataLoader as DataLoader

__all__ = ["Config", "DataLoader"]
