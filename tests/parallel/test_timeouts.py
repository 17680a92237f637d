"""How long collectives wait for other processes can be set, and stretched for a while."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dalle_ds.config import ParallelConfig
from dalle_ds.parallel import Mesh
from dalle_ds.resilience.watch import is_about_communication

SHORT, LONG = 2 / 60, 1.0
"""Minutes."""


def limits() -> set[float]:
    """Time-outs in force, in minutes, as torch has them of groups in which anyone waits."""
    groups = [group for group in dist.distributed_c10d._world.pg_map if group.size() > 1]
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return {round(backend.options._timeout / datetime.timedelta(minutes=1), 4) for backend in backends}


def together(rank: int, store: str, results: Any) -> None:
    """Be one of two processes, of which the second is late now and then."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = Mesh(rank, 2, torch.device("cpu")).divide(ParallelConfig(tensor=2))
    dist.new_group([0, 1])  # such as DeepSpeed makes
    found: dict[str, Any] = {"before": limits()}
    mesh.set_timeout(SHORT)
    found["set"] = limits()
    with mesh.extended_timeout(LONG):
        found["patient"] = limits()
        if rank == 1:
            time.sleep(3)  # rank 0 has left the block's body long before
        with mesh.extended_timeout(SHORT):
            found["nested"] = limits()
    mesh.barrier()
    found["after"] = limits()
    try:
        with mesh.extended_timeout(LONG):
            raise KeyError("row 7")
    except KeyError:
        found["after an error"] = limits()
    if rank == 1:
        time.sleep(5)
    try:
        began = time.monotonic()
        mesh.sum(torch.ones(3), "world")
    except RuntimeError as error:
        found |= {"late": str(error), "about": is_about_communication(error)}
        found["seconds"] = time.monotonic() - began
    results[rank] = found


def test_time_outs_of_all_groups_are_set_stretched_and_said(tmp_path: Path) -> None:
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(together, (str(tmp_path / "store"), results), nprocs=2)
        found = dict(results)
    for rank in range(2):
        assert found[rank]["before"] == {30.0}
        assert found[rank]["patient"] == found[rank]["nested"] == {LONG}
        assert found[rank]["set"] == found[rank]["after"] == found[rank]["after an error"] == {round(SHORT, 4)}
    assert "Timed out" in found[0]["late"] and found[0]["about"]
    assert 1.9 < found[0]["seconds"] < 4.5


def test_a_process_alone_waits_for_no_one() -> None:
    alone = Mesh(0, 1, torch.device("cpu"))
    alone.set_timeout(1)
    with alone.extended_timeout(1):
        pass
