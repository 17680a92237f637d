"""Training of the duplicate detector (CLIP App. C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dalle_ds.config.overlap import DuplicateRun
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.duplicate_views import DuplicateSamples
from dalle_ds.errors import DataError
from dalle_ds.models.contrastive import contrastive_logits
from dalle_ds.models.duplicates import DuplicateDetector
from dalle_ds.parallel import WHOLE, TensorGroup
from dalle_ds.parallel.peers import ALONE, Peers
from dalle_ds.sampling.grid import picture_grid
from dalle_ds.sampling.pixels import to_pictures
from dalle_ds.tasks.base import Batch, Metrics, Samples
from dalle_ds.tasks.embeddings import at_places, collapse, spread
from dalle_ds.tasks.flops import training_flops
from dalle_ds.tasks.whole_batch import Outputs, WholeBatchTask

PREVIEW_MATCHES = 4
START_ROWS = 32
"""Training pictures that the first weights are fitted to, each with a copy."""


class DuplicatesTask(WholeBatchTask[DuplicateRun]):
    """Maximizes the similarity of a picture and its distorted copy, relative to that with all others of the batch."""

    name = "duplicates"

    def build_model(self, tensor: TensorGroup = WHOLE) -> DuplicateDetector:
        return DuplicateDetector(self.run.model)

    def initial_weights(self) -> Mapping[str, Tensor]:
        """Those of a model that was fitted to some training pictures and copies, the same on all processes."""
        samples = self.samples("train")
        views = []
        for number in range(min(START_ROWS, len(samples))):
            row = number * len(samples) // min(START_ROWS, len(samples))
            with suppress(DataError):
                arrays = samples.sample(row, np.random.default_rng((self.run.seed, row)))
                views += [torch.as_tensor(arrays["image"]), torch.as_tensor(arrays["copy"])]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.run.seed)
            model = self.build_model()
        if views:
            model.fit_start(torch.stack(views).float() / 255)
        return model.state_dict()

    def corpus_samples(self, folder: str, split: str) -> Samples:
        """Validation compares copies with the pictures themselves, whatever training does: so does the search for overlap."""
        both = split == "train" and self.run.objective.views == "distorted"
        dataset = PairDataset.open(folder, split)
        return DuplicateSamples(dataset, self.run.model.image_size, self.run.distortions, both=both)

    def identity(self) -> dict[str, str]:
        return self.data_identity()

    def prepare(self, batch: Batch) -> Batch:
        return {**batch, "image": batch["image"].float() / 255, "copy": batch["copy"].float() / 255}

    def embed(self, model: Callable[..., Any], batch: Batch) -> Outputs:
        image, copy = model(torch.cat([batch["image"], batch["copy"]])).chunk(2)
        return {"image": image, "copy": copy}

    def loss_of(self, outputs: Outputs, peers: Peers = ALONE) -> tuple[Tensor, Metrics]:
        image, copy = outputs["image"], outputs["copy"]
        logits = contrastive_logits(image, copy, self._scale(image), peers)
        sums = {"rows": image.new_full((1,), len(image)), "image_sum": image.detach().sum(dim=0)}
        return logits.loss(), {"accuracy": logits.accuracy(), **sums}

    def digest(self, sums: Metrics) -> dict[str, float]:
        """Spread of the whole batch's embeddings: a process may have one row, of which there is none."""
        return {"spread": spread(sums["image_sum"] / sums["rows"])}

    def _scale(self, embeddings: Tensor) -> Tensor:
        return torch.tensor(1 / self.run.objective.temperature, device=embeddings.device)

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> Metrics:
        """Embeddings of these rows; see `at_places`."""
        embedded = {
            name: at_places(rows, batch, self.validation_rows) for name, rows in self.embed(model, batch).items()
        }
        return {"count": batch["valid"].sum(), **embedded}

    def summarize(self, sums: Metrics) -> dict[str, float]:
        """Of all rows against each other: loss, share of copies that are nearest to their own picture, and mean cosines of
        copies with their own picture ("own") and with the nearest other one ("other").

        All but "own" depend on the number of rows.
        """
        image, copy = sums["image"], sums["copy"]
        logits = contrastive_logits(image, copy, self._scale(image))
        cosines = copy @ image.T
        own = cosines.diagonal().clone()
        cosines.fill_diagonal_(-1.0)
        return {
            "loss": float(logits.loss()),
            "accuracy": float(logits.accuracy()),
            "own": float(own.mean()),
            "other": float(cosines.amax(dim=1).mean()),
            "spread": spread(image.mean(dim=0)),
        }

    def preview(self, model: nn.Module, batch: Batch) -> Image.Image:
        """Distorted copies, each with its picture and those of the batch that are most similar to it."""
        detector = cast(DuplicateDetector, model)
        # The model may have moved to another type, which the embeddings do not show.
        cosines = detector.embed_images(batch["copy"]) @ detector.embed_images(batch["image"]).T
        pictures, copies = to_pictures(batch["image"]), to_pictures(batch["copy"])
        best, found = cosines.topk(min(PREVIEW_MATCHES, len(pictures)), dim=1)
        rows = [
            (f"cosine {first[0]:.2f}", [copies[number], pictures[number], *(pictures[match] for match in matches)])
            for number, (first, matches) in enumerate(zip(best.tolist(), found.tolist(), strict=True))
        ]
        titles = ["copy", "its own", *(f"match {n + 1}" for n in range(PREVIEW_MATCHES))]
        return picture_grid(rows, titles=titles, cell=64)

    def export(self, model: nn.Module, folder: Path) -> None:
        """A folder that `DuplicateDetector.from_pretrained` reads."""
        cast(DuplicateDetector, model).save_pretrained(folder)

    def flops_per_sample(self) -> float:
        size = self.run.model.image_size
        return training_flops(self.build_model, lambda model: model(torch.zeros(2, 3, size, size)))

    def alarm(self, metrics: Mapping[str, float], step: int) -> str | None:
        return None if step < self.run.optim.warmup_steps else collapse(metrics["spread"])
