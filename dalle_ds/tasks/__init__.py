"""One file per trainable thing: it builds the model, turns a batch into a loss and metrics, and makes a preview."""

from dalle_ds.tasks.base import Batch, Metrics, Samples, Task

__all__ = ["Batch", "Metrics", "Samples", "Task"]
