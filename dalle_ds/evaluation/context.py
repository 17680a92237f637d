"""What all parts of an evaluation share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from dalle_ds.data import PairDataset
from dalle_ds.evaluation.dealing import dealt
from dalle_ds.evaluation.metrics.appearance import Appearance
from dalle_ds.evaluation.metrics.features import FeatureNetwork
from dalle_ds.evaluation.sets import Caption, Selections, pictures_of
from dalle_ds.models.clip import Clip
from dalle_ds.parallel import Mesh


@dataclass
class Context:
    """A split, how its pictures are looked at, and what has been found so far."""

    mesh: Mesh
    dataset: PairDataset
    captions: list[Caption]
    """To draw pictures for."""
    size: int
    """Side in pixels that pictures are compared at."""
    radii: list[float]
    """Of the blur."""
    network: FeatureNetwork | None
    """None where no two sets are compared."""
    kept: Tensor | None = None
    """(rows,) bool, rows that do not overlap with the training data; None where that is not looked at."""
    reference_of_captions: bool = False
    """Whether the real set is that of the captions' rows instead of the whole split."""
    judge: Clip | None = None
    """Says how well captions and pictures match."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures by name."""
    sheets: dict[str, Image.Image] = field(default_factory=dict)
    """Pictures for the page by name, on the main process."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each part took."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know."""

    def selections(self, rows: Tensor) -> Selections:
        """Of things that belong to `rows` (N,) of the split."""
        every: Selections = {"": torch.ones(len(rows), dtype=torch.bool)}
        return every if self.kept is None else every | {"without_overlap": self.kept[rows]}

    @property
    def of_rows(self) -> Selections:
        """Of all rows."""
        return self.selections(torch.arange(len(self.dataset)))

    @property
    def of_captions(self) -> Selections:
        """Of all captions."""
        return self.selections(torch.tensor([caption.row for caption in self.captions], dtype=torch.int64))

    def record(self, selection: str, prefix: str, figures: dict[str, float]) -> None:
        """Add figures under their names."""
        start = "/".join(part for part in (selection, prefix) if part)
        self.metrics |= {f"{start}/{name}": value for name, value in figures.items()}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measure how long a part takes."""
        started = time.monotonic()
        yield
        self.seconds[part] = round(time.monotonic() - started, 1)

    @cached_property
    def whole_split(self) -> Appearance:
        """Statistics of all real pictures of the split. Collective, at the first use."""
        return self._real(list(range(len(self.dataset))))

    @cached_property
    def reference(self) -> Appearance:
        """Statistics of the real pictures that drawn ones are compared with. Collective, at the first use."""
        if not self.reference_of_captions:
            return self.whole_split
        return self._real(sorted({caption.row for caption in self.captions}))

    def _real(self, rows: list[int]) -> Appearance:
        assert self.network is not None
        found = Appearance(self.network, self.radii, self.selections(torch.tensor(rows)), generated=False)
        for indices in dealt(len(rows), self.mesh, "real pictures"):
            pixels = pictures_of(self.dataset, [rows[index] for index in indices], self.size)
            found.add(indices, pixels.to(self.mesh.device))
        return found.summed(self.mesh)
