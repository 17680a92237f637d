"""How processes divide the work. Outside of it, only launchers, monitors and messages read a rank from the environment.

`mesh.py` says who does what; `tensor.py` how layers are divided among processes. The layers themselves stand beside the
others in `nn/layers.py`.
"""

from dalle_ds.parallel.mesh import Mesh
from dalle_ds.parallel.tensor import WHOLE, Split, TensorGroup, split_of

__all__ = ["WHOLE", "Mesh", "Split", "TensorGroup", "split_of"]
