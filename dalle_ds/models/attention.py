"""The public name of `dalle_ds.nn.attention`."""

from dalle_ds.nn.attention import attention_mask, configured_kinds, layer_kinds

__all__ = ["attention_mask", "configured_kinds", "layer_kinds"]
