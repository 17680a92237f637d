"""dalle_ds: DALL·E and CLIP training on DeepSpeed, from one laptop CPU to a cluster."""

__version__ = "0.1.0"
