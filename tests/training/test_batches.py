"""What a run feeds its model, for its own seed, split and place among the processes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_ds.config import DiscreteVAEConfig, DvaeRun, LoaderConfig, TrainConfig
from dalle_ds.data import BatchLoader
from dalle_ds.parallel import Mesh
from dalle_ds.tasks.dvae import DvaeTask
from dalle_ds.training.batches import Batches

ALONE = Mesh(0, 1, torch.device("cpu"))
SHAPE = DiscreteVAEConfig(image_size=16, groups=2, encoder_width=4, decoder_width=4, decoder_input=4, vocab_size=8)


def keys(batches: Any) -> list[list[int]]:
    """Of the first three batches; each sample's key follows from the seed, the step and its place."""
    return [batch["key"].tolist() for batch in islice(batches, 3)]


@pytest.mark.parametrize("step", [0, 5])
def test_training_is_in_the_order_of_the_runs_seed_from_the_step_that_is_asked_for(data: Path, step: int) -> None:
    found = []
    for seed in (3, 4):
        run = DvaeRun(
            data=str(data),
            seed=seed,
            model=SHAPE,
            train=TrainConfig(batch_size=8),
            loader=LoaderConfig(workers=0),
        )
        task = DvaeTask(run)
        found.append(keys(Batches(task, run, 8, ALONE).train(step)))
        loader = BatchLoader(
            task.samples("train"), seed=seed, batch_size=8, micro_batch=8, rank=0, world_size=1, start_step=step
        )
        assert found[-1] == keys(iter(loader))
    assert found[0] != found[1]
