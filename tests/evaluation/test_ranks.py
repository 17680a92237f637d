"""Sums over processes come before figures: 1, 2 and 4 of them find what torch-fidelity finds in one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from dalle_ds.evaluation.features import gaussian_blur
from dalle_ds.evaluation.frechet import split_count
from dalle_ds.parallel import Mesh
from tests.conftest import ROOT
from tests.evaluation import ranks_worker as worker
from tests.references import reference


def expected(rows: int, radius: float, chosen: torch.Tensor) -> tuple[float, float]:
    """torch-fidelity's distance and score of all features at once."""
    real = worker.NETWORK(gaussian_blur(worker.pictures(worker.REAL, worker.REAL), radius))[0]
    features, logits = worker.NETWORK(gaussian_blur(worker.pictures(rows, rows), radius))
    real = real[
        worker.selections(worker.REAL)[""] if bool(chosen.all()) else worker.selections(worker.REAL)["without_overlap"]
    ]
    fid, isc = reference("torch_fidelity.metric_fid"), reference("torch_fidelity.metric_isc")
    statistics = [fid.fid_features_to_statistics(each.double()) for each in (real, features[chosen])]
    distance = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    score = isc.isc_features_to_metric(logits[chosen], split_count(int(chosen.sum())), True, 2020)
    return distance, score["inception_score_mean"]


@pytest.fixture(scope="module", params=[1, 2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process says."""
    world = request.param
    if world == 1:
        return [json.loads(json.dumps(worker.measure(Mesh(0, 1, torch.device("cpu")))))]
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.evaluation.ranks_worker"]
    running = [
        subprocess.Popen([*command, str(rank), str(world), str(folder / "store"), str(folder)], cwd=ROOT)
        for rank in range(world)
    ]
    assert [process.wait(300) for process in running] == [0] * world
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def test_figures_are_those_of_all_features_at_once(found: list[dict]) -> None:
    for name, rows in (("fake", worker.FAKE), ("few", worker.FEW)):
        for selection, chosen in worker.selections(rows).items():
            for radius in worker.RADII:
                distance, score = expected(rows, radius, chosen)
                for rank in found:
                    figures = rank[name][selection]
                    assert figures[f"toy_frechet/blur_{radius:g}"] == pytest.approx(distance, rel=1e-4)
                    assert figures[f"toy_score/blur_{radius:g}"] == pytest.approx(score, rel=1e-6)


def test_every_row_counts_once_on_every_process(found: list[dict]) -> None:
    for rank in found:
        assert rank["rows"] == pytest.approx([0.1 * row for row in range(worker.FAKE)])
        assert rank == found[0]
