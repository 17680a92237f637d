"""The transformer's attention: what each kind means, and how it is computed where."""

from dalle_ds.nn.attention.masks import attention_mask, configured_kinds, layer_kinds
from dalle_ds.nn.attention.pattern import Attend, AttentionPattern, SelfAttention

__all__ = ["Attend", "AttentionPattern", "SelfAttention", "attention_mask", "configured_kinds", "layer_kinds"]
