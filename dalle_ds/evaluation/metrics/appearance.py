"""How a set of pictures looks to a feature network, at every blur radius, and how far two sets are apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_ds.evaluation.dealing import CHUNK
from dalle_ds.evaluation.metrics.blur import gaussian_blur
from dalle_ds.evaluation.metrics.features import FeatureNetwork
from dalle_ds.evaluation.metrics.statistics import (
    Moments,
    Predictions,
    frechet_distance,
    inception_score,
    split_count,
    split_of_rows,
)
from dalle_ds.evaluation.sets import Selections
from dalle_ds.parallel import Mesh

Key = tuple[str, float]
"""Selection, blur radius."""


class Appearance:
    """Statistics of a set, of which each process adds its rows.

    Args:
        network: takes the features.
        radii: of the blur before that.
        selections: parts of the set that get statistics of their own.
        generated: whether it gets a score, which is of generated pictures only.
    """

    def __init__(
        self, network: FeatureNetwork, radii: Sequence[float], selections: Selections, *, generated: bool
    ) -> None:
        self.network = network
        self.radii = list(radii)
        self.selections = selections
        self.generated = generated
        self.moments: dict[Key, Moments] = {}
        self.predictions: dict[Key, Predictions] = {}
        self._splits: dict[str, Tensor] = {}
        self._numbers: dict[str, int] = {}
        for name, chosen in selections.items():
            rows = int(chosen.sum())
            self._numbers[name] = split_count(rows)
            self._splits[name] = torch.zeros(len(chosen), dtype=torch.int64)
            self._splits[name][chosen] = split_of_rows(rows)

    def add(self, rows: Sequence[int], pixels: Tensor) -> None:
        """Add pictures (len(rows), 3, H, W) uint8; a row must be added once, by one process."""
        index = torch.tensor(rows, dtype=torch.int64)
        blurred = torch.cat([gaussian_blur(pixels, radius) for radius in self.radii])
        outputs = [self.network(chunk) for chunk in blurred.split(CHUNK)]
        features = torch.cat([features for features, _ in outputs]).split(len(rows))
        logits = torch.cat([logits for _, logits in outputs]).split(len(rows))
        for number, radius in enumerate(self.radii):
            for name, chosen in self.selections.items():
                mask = chosen[index]
                self._accumulate((name, radius), features[number], logits[number], mask, self._splits[name][index])

    def _accumulate(self, key: Key, features: Tensor, logits: Tensor, mask: Tensor, splits: Tensor) -> None:
        kept = mask.to(features.device)
        moments = Moments.of(features[kept])
        self.moments[key] = self.moments[key] + moments if key in self.moments else moments
        if self.generated:
            predictions = Predictions.of(logits[kept], splits[mask], self._numbers[key[0]])
            self.predictions[key] = self.predictions[key] + predictions if key in self.predictions else predictions

    def summed(self, mesh: Mesh) -> Appearance:
        """That of all processes' rows. Collective."""
        whole = Appearance(self.network, self.radii, self.selections, generated=self.generated)
        keys = [(name, radius) for name in self.selections for radius in self.radii]
        if any(mesh.gather_objects(len(self.moments) == 0)):
            self._fill(keys, mesh)
        whole.moments = {key: self.moments[key].summed(mesh) for key in keys}
        if self.generated:
            whole.predictions = {key: self.predictions[key].summed(mesh) for key in keys}
        return whole

    def _fill(self, keys: Sequence[Key], mesh: Mesh) -> None:
        """Zeros on a process that got no rows, of the shapes that others have. Collective."""
        sizes = [(moments.total.shape[0], self._classes()) for moments in list(self.moments.values())[:1]]
        dimensions, classes = next(size for found in mesh.gather_objects(sizes) for size in found)
        if self.moments:
            return
        zeros = torch.zeros(0, dimensions, device=mesh.device), torch.zeros(0, classes, device=mesh.device)
        none = torch.zeros(0, dtype=torch.bool)
        for key in keys:
            self._accumulate(key, *zeros, none, torch.zeros(0, dtype=torch.int64))

    def _classes(self) -> int:
        return next(iter(self.predictions.values())).probability.shape[1] if self.generated else 0


def distances(reference: Appearance, other: Appearance) -> dict[str, dict[str, float]]:
    """Selection → figures: Fréchet distance at every radius, and the score of the other set where it is a generated one.

    Selections that the reference lacks are compared with all of it.
    """
    figures: dict[str, dict[str, float]] = {}
    for name in other.selections:
        basis = name if name in reference.selections else ""
        found: dict[str, float] = {}
        for radius in other.radii:
            moments = other.moments[name, radius]
            found[f"{other.network.distance}/blur_{radius:g}"] = frechet_distance(
                reference.moments[basis, radius], moments
            )
        if other.generated:
            for radius in other.radii:
                found[f"{other.network.score}/blur_{radius:g}"] = inception_score(other.predictions[name, radius])
        figures[name] = found
    return figures
