"""Preparation on a Ray cluster: its parts as Ray tasks. Ray brings them to machines, and does again those that are lost.

Ray, and not Spark through `datasets`: it comes as one wheel, needs no Java, and starts inside of a SLURM job. Its tasks, and
not its data sets: how a corpus is divided, gone on with and put together is the same with Ray, as an array of jobs and in one
process (`parts`), and so is what comes out.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from pathlib import Path

from dalle_ds.data.parts import Parts
from dalle_ds.data.prepare import PrepareOptions, merge_parts, prepare_part
from dalle_ds.data.report import PreparationReport
from dalle_ds.errors import ConfigError, DalleError

_PARTS_IN_TURN = 4  # a part that is lost is done again as a whole
_STORE_BYTES = 100 * 2**20  # next to nothing goes through it: parts are files


def prepare_with_ray(
    options: PrepareOptions, out: str, parts: int | None = None, *, workers: int = 1, overwrite: bool = False
) -> PreparationReport:
    """`prepare`, its parts done by the cluster at RAY_ADDRESS, whose machines share the disk, or by this machine's cores.

    Args:
        parts: how many; None takes those of a preparation that was begun, or four times as many as can be done at a time.
        workers: processes of each part, and the cores that Ray gives it.
        overwrite: replace an earlier preparation in `out`, complete or begun.

    Raises:
        ConfigError: ray is not installed, or as `prepare`.
        DataError: as `prepare`.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("engine ray needs Ray, which is not installed: pip install dalle-ds[ray]") from error
    plain = PrepareOptions(**{field.name: getattr(options, field.name) for field in dataclasses.fields(PrepareOptions)})
    started = not ray.is_initialized()
    if started and "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    elif started:
        start_ray()
    try:
        cores = max(workers, 1)
        at_a_time = max(1, int(ray.cluster_resources().get("CPU", 1)) // cores)
        count = parts or Parts(Path(out)).begun() or _PARTS_IN_TURN * at_a_time
        task = ray.remote(num_cpus=cores)(_part)
        ray.get([task.remote(Path.cwd(), plain, out, part, count, workers, overwrite) for part in range(count)])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DalleError):
            raise error.cause from error
        raise
    finally:
        if started:
            ray.shutdown()
    return merge_parts(out, count, options=plain, overwrite=overwrite)


def start_ray(cores: int | None = None) -> None:
    """A cluster of this machine's cores, or of so many, that leaves nothing in the home folder and tells nobody of itself."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray would write one to ~/.ray
    ray.init(num_cpus=cores, include_dashboard=False, object_store_memory=_STORE_BYTES, log_to_driver=False)


def _part(
    folder: Path, options: PrepareOptions, out: str, part: int, parts: int, workers: int, overwrite: bool
) -> None:
    """One part, in the folder that the command was given in, so that its paths mean the same."""
    os.chdir(folder)
    prepare_part(options, out, part, parts, workers=workers, overwrite=overwrite)
