"""Generated pictures against real ones, in two folders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

import dalle_ds
from dalle_ds.errors import ConfigError
from dalle_ds.evaluation.dealing import Collected, dealt
from dalle_ds.evaluation.metrics.appearance import Appearance, distances
from dalle_ds.evaluation.metrics.features import FeatureNetwork, load_network
from dalle_ds.evaluation.options import EvaluateOptions
from dalle_ds.evaluation.results import METHOD, Result
from dalle_ds.evaluation.sets import RESIZE, PictureFolder, stacked
from dalle_ds.parallel import Mesh


def compare_folders(options: EvaluateOptions, mesh: Mesh) -> Result:
    """Distance of the pictures in `fake` from those in `real`, and score of the former. Collective.

    Raises:
        ConfigError: no size is given, and the pictures have several.
        DataError: a folder with fewer than two pictures, or a picture that cannot be read.
    """
    assert options.real is not None and options.fake is not None
    real, fake = PictureFolder(options.real), PictureFolder(options.fake)
    size = options.size or _only_size((real, fake))
    network = load_network(options.inception, mesh.device)
    of_real, real_sha256 = _appearance(real, network, options.radii, size, mesh, generated=False)
    of_fake, fake_sha256 = _appearance(fake, network, options.radii, size, mesh, generated=True)
    protocol = {
        "method": METHOD,
        "set": {"fingerprint": real_sha256, "rows": len(real)},
        "pictures": {"size": size, "resize": RESIZE},
        "generated": {"number": len(fake)},
        "features": network.protocol(options.radii),
    }
    notes = real.notes() + fake.notes()
    return Result(protocol, {"pictures": fake_sha256}, distances(of_real, of_fake)[""], dalle_ds.__version__, notes)


def _only_size(folders: Sequence[PictureFolder]) -> int:
    """The side of square pictures, judged by the first of each folder; where one of the others differs, it is resized."""
    shapes = {folder.read(0)[0].shape[:2] for folder in folders}
    sides = {side for shape in shapes for side in shape}
    if len(sides) > 1:
        raise ConfigError(
            f"the pictures have sides of {', '.join(map(str, sorted(sides)))} pixels: say with --size at which they are to be "
            "compared"
        )
    return sides.pop()


def _appearance(
    folder: PictureFolder,
    network: FeatureNetwork,
    radii: Sequence[float],
    size: int,
    mesh: Mesh,
    *,
    generated: bool,
) -> tuple[Appearance, str]:
    """Statistics of a folder, and the SHA-256 of its files' contents in the order of their names."""
    every = {"": torch.ones(len(folder), dtype=torch.bool)}
    found = Appearance(network, radii, every, generated=generated)
    digests = Collected(len(folder), (32,), torch.int32)
    for rows in dealt(len(folder), mesh, str(folder.folder)):
        pictures = [folder.read(row, size) for row in rows]
        found.add(rows, stacked([pixels for pixels, _ in pictures]).to(mesh.device))
        digests.put(rows, torch.tensor([list(digest) for _, digest in pictures]))
    contents = bytes(digests.everything(mesh).flatten().tolist())
    return found.summed(mesh), hashlib.sha256(contents).hexdigest()
