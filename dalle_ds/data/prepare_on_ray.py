"""Preparation on a Ray cluster: its parts (`parts`) as Ray tasks. Ray brings them to machines, and does again those that are
lost. What comes out is the same as in one process."""

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


def prepare_on_ray(
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
    started, folder, cores = not ray.is_initialized(), Path.cwd(), max(workers, 1)

    @ray.remote(num_cpus=cores)
    def do_part(part: int) -> None:
        os.chdir(folder)  # in which the command was given, so that its paths mean the same
        prepare_part(plain, out, part, count, workers=workers, overwrite=overwrite)

    if started and "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    elif started:
        start_ray()
    try:
        at_a_time = max(1, int(ray.cluster_resources().get("CPU", 1)) // cores)
        count = parts or Parts(Path(out)).begun() or _PARTS_IN_TURN * at_a_time
        ray.get([do_part.remote(part) for part in range(count)])
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
