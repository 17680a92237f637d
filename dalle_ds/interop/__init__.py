"""Models that others published, read without running anything that their files ask for.

Over its size, since five layouts of CLIP and two of unCLIP are read, what does not fit in any is named, and no file may take
much of little.
"""

from dalle_ds.interop.clip_export import export_clip
from dalle_ds.interop.clip_import import import_clip, load_clip
from dalle_ds.interop.karlo import import_karlo
from dalle_ds.interop.karlo_export import export_karlo
from dalle_ds.interop.openai_dvae import import_openai_dvae, load_openai_dvae
from dalle_ds.interop.torch_files import load_tensors
from dalle_ds.interop.vqgan import import_vqgan, load_vqgan

__all__ = [
    "export_clip",
    "export_karlo",
    "import_clip",
    "import_karlo",
    "import_openai_dvae",
    "import_vqgan",
    "load_clip",
    "load_openai_dvae",
    "load_tensors",
    "load_vqgan",
]
