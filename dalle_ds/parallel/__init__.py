"""How processes divide the work. Nothing outside this room reads a rank or a world size from the environment."""

from dalle_ds.parallel.mesh import Mesh

__all__ = ["Mesh"]
