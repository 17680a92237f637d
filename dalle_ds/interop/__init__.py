"""Models that others published, read without running anything that their files ask for."""

from dalle_ds.interop.openai_dvae import import_openai_dvae, load_openai_dvae
from dalle_ds.interop.pickles import TORCH_CLASSES, read_pickled_tensors

__all__ = ["TORCH_CLASSES", "import_openai_dvae", "load_openai_dvae", "read_pickled_tensors"]
