"""Pure modules: no process groups, no logging, no DeepSpeed."""

from dalle_ds.models.clip import Clip
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.dvae import DiscreteVAE

__all__ = ["Clip", "Dalle", "DiscreteVAE"]
