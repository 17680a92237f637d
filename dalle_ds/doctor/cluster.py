"""The command line of `launchers/doctor.py cluster`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType

from dalle_ds.cli import explain
from dalle_ds.config import ParallelConfig
from dalle_ds.config.plain import positive
from dalle_ds.errors import ConfigError

MINUTES = 3
"""How long processes wait for each other before the check fails."""


@dataclass(frozen=True)
class ClusterOptions:
    """Check the processes of a launch (slurm/doctor.sbatch, deepspeed, torchrun, or one alone) in about a minute: versions,
    clocks, collectives along each axis, the disk, a short training; status 1 where something is wrong."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """Where runs will be: a folder that all machines share."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How runs will divide the processes."""
    device: str = "auto"
    """auto, cpu or cuda."""
    megabytes: int = 256
    """What a collective exchanges."""
    disk_megabytes: int = 256
    """What each process writes and reads."""
    slow: float = 1.5
    """How many times as long as the median process one may compute."""

    def __post_init__(self) -> None:
        positive("cluster", self, "megabytes", "disk_megabytes")
        if self.slow <= 1:
            raise ConfigError(f"slow must be greater than 1, found {self.slow}")


def check_cluster(options: ClusterOptions) -> tuple[RenderableType | None, list[str]]:
    """What there is to show, on the main process, and what is wrong, on all."""
    # PyTorch takes seconds to import: the help and mistakes on the command line are told before.
    from dalle_ds.config.parallel import WatchConfig
    from dalle_ds.parallel import Mesh
    from dalle_ds.resilience.watch import Watch

    mesh = Mesh.start(options.device, timeout_minutes=MINUTES)
    with Watch(mesh, explain, WatchConfig(hang_minutes=None), None):
        from dalle_ds.doctor.checkup import examine  # DeepSpeed picks a device when it is imported

        checkup = examine(
            mesh,
            options.parallel,
            Path(options.path),
            megabytes=options.megabytes,
            disk_megabytes=options.disk_megabytes,
            slow=options.slow,
        )
    mesh.stop()
    return checkup.report() if mesh.is_main else None, checkup.faults()
