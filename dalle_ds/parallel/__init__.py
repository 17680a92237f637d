"""How processes divide the work. Nothing outside this room reads a rank or a world size from the environment.

`mesh.py` says who does what; `tensor.py` how layers are divided among processes. The layers themselves stand beside the
others in `nn/layers.py`.
"""

from dalle_ds.parallel.mesh import Mesh
from dalle_ds.parallel.tensor import WHOLE, Split, TensorGroup, split_of

__all__ = ["WHOLE", "Mesh", "Split", "TensorGroup", "split_of"]
