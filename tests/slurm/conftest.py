"""One cluster for all tests of this folder, and a site file for it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster, what_lacks

STANDIN = Path(__file__).with_name("standin.py")
REQUEUE_LIMIT = 2
SITE = f"""
ACCOUNT= PARTITION= TIME_LIMIT=10 NODES=2 GPUS_PER_NODE=0 PROCESSES_PER_NODE=1 CPUS_PER_PROCESS=1 SBATCH_OPTIONS=()
WARNING_SECONDS=60 REQUEUE_LIMIT={REQUEUE_LIMIT} CRASH_LIMIT=${{CRASH_LIMIT:-2}} LAST_EXIT_SECONDS=20
prepare_environment() {{ export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}; }}
"""


class Desk:
    """Where a user sits: calls the scripts of slurm/ from a folder, with its logs."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.logs = folder / "logs"
        site = folder / "site.sh"
        site.write_text(SITE)
        self.environment = {"DALLE_SITE": str(site), "DALLE_LOGS": str(self.logs)}

    def call(self, script: str, *arguments: object, check: bool = True, **environment: str) -> str:
        """What a script of slurm/ prints, errors included."""
        command = [str(ROOT / "slurm" / script), *map(str, arguments)]
        return self.cluster.run(*command, check=check, **{**self.environment, **environment})

    def submit(self, *arguments: object, **environment: str) -> str:
        """Number of a job."""
        return self.call("submit.sh", *arguments, **environment).strip()

    def standin(self, *fates: str, options: tuple[str, ...] = (), name: str = "dvae", **environment: str) -> str:
        """Submit a stand-in of a stage; see standin.py."""
        script = self.folder / f"{name}.sbatch"
        script.write_text(
            f'#!/bin/bash\n#SBATCH --job-name={name}\nexec "$DALLE_ROOT/slurm/launch.sh" {STANDIN} "$@"\n'
        )
        return self.submit(*options, script, *fates, **environment)

    def log(self, job: str, rank: int | None = None, name: str = "dvae") -> str:
        """What a rank of a job, or the job itself, has written."""
        path = self.logs / f"{name}-{job}" / f"rank-{rank}.log" if rank is not None else self.logs / f"{name}-{job}.log"
        return path.read_text() if path.exists() else ""

    def outcomes(self, job: str, name: str = "dvae") -> list[str]:
        """How each start of a job ended, without the time."""
        path = self.logs / f"{name}-{job}" / "outcome"
        return [line.partition(" ")[2] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if lacking := what_lacks():
        pytest.skip(f"no SLURM cluster can be started here: {lacking}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets' paths may have 107 characters
    try:
        running = Cluster(folder)
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(cluster, tmp_path_factory.mktemp("desk"))
