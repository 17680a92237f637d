"""The one Trainer of every task: DeepSpeed engine, loop, checkpoints, tracking."""
