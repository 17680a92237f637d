"""PowerSGD against means, singular values and Gram-Schmidt, alone and among replicas that are processes of their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from dalle_ds.config import PowerSGDConfig
from dalle_ds.parallel.powersgd import MatrixShard, PowerSGD, in_turns, orthonormal, paper_rank
from tests.parallel import powersgd_worker as worker
from tests.parallel.powersgd_worker import FORMATS, SHARDS, UPDATES, mean_gradients

NAMES = [shard.name for shard in SHARDS]
TALL = NAMES.index("tall")


# --- the paper's ranks


@pytest.mark.parametrize(("width", "rank"), [(1920, 512), (2688, 640), (3968, 896)])
def test_the_papers_widths_have_the_papers_ranks(width: int, rank: int) -> None:
    assert paper_rank(width) == paper_rank(width, 8) == rank


def test_other_widths_lie_between_and_ranks_can_be_shared_out() -> None:
    assert paper_rank(1024) == 256  # 0.2667 · 1024 = 273
    assert paper_rank(2304) == 640  # halfway: 0.2524 · 2304 = 581, for which 5 · 128 is nearer than 4 · 128
    assert paper_rank(8192) == 1792  # 0.2258 · 8192 = 1850
    assert paper_rank(64) == 17 and paper_rank(64, 2) == 18 and paper_rank(512, 4) == 136
    assert paper_rank(3968, 6) % 6 == 0 and abs(paper_rank(3968, 6) - 896) <= 3
    assert paper_rank(8, 16) == 16
    for shards in (1, 2, 3, 4, 8, 16):
        ranks = [paper_rank(width, shards) for width in range(1920, 8192, 8)]
        assert ranks == sorted(ranks) and all(rank % shards == 0 for rank in ranks)


# --- orthonormal columns


def gram_schmidt(matrix: Tensor, *, modified: bool) -> Tensor:
    """Orthonormal columns by the textbook, in the precision of `matrix`."""
    columns: list[Tensor] = []
    for column in matrix.unbind(1):
        rest = column.clone()
        for done in columns:
            rest = rest - (done @ (rest if modified else column)) * done
        columns.append(rest / rest.norm())
    return torch.stack(columns, 1)


def deviation(basis: Tensor) -> float:
    """How far from orthonormal the columns are."""
    basis = basis.double()
    return float((basis.transpose(-1, -2) @ basis - torch.eye(basis.shape[-1])).abs().max())


def ill_conditioned(rows: int, columns: int) -> Tensor:
    """fp32 with singular values from 1 to 1e-8."""
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64))
    return (left * torch.logspace(0, -8, columns, dtype=torch.float64) @ right).float()


def test_columns_are_orthonormal_where_gram_schmidts_are_not() -> None:
    matrix = ill_conditioned(96, 32)
    ours, is_broken = orthonormal(matrix[None], 1e-6)
    assert deviation(ours) < 1e-5 and not is_broken
    regularized = matrix / matrix.abs().max() + 1e-6 * torch.eye(96, 32)
    assert deviation(gram_schmidt(regularized, modified=False)) > 0.1
    assert deviation(gram_schmidt(regularized, modified=True)) > 100 * deviation(ours)
    # They span what they should: all but what ε added lies in them.
    lost = matrix.double() - ours[0].double() @ (ours[0].double().t() @ matrix.double())
    assert lost.abs().max() < 3e-6 * matrix.abs().max()


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_they_are_those_of_the_regularized_matrix(epsilon: float) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 9, 4) * torch.tensor([1.0, 20.0])[:, None, None]
    ours, _ = orthonormal(matrices, epsilon)
    exact = matrices.double() / matrices.abs().max() + epsilon * torch.eye(9, 4, dtype=torch.float64)
    theirs = torch.stack([gram_schmidt(matrix, modified=True) for matrix in exact])
    assert torch.allclose(ours.double() * (ours.double() * theirs).sum(1, keepdim=True).sign(), theirs, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_gradients_of_any_size_are_treated_alike(size: float) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 20, 8)
    ours, is_broken = orthonormal(matrices * size, 1e-6)
    assert deviation(ours) < 1e-5 and not is_broken
    assert torch.allclose(ours, orthonormal(matrices, 1e-6)[0], atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_reaches_the_decomposition(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    decompose = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: seen.append(matrix.clone()) or decompose(matrix))
    matrices = torch.randn(2, 6, 3)
    matrices[1, 4, 2] = value
    ours, is_broken = orthonormal(matrices, 1e-6)
    assert is_broken and len(seen) == 1 and seen[0].isfinite().all() and deviation(ours) < 1e-5


def test_nothing_has_orthonormal_columns_too() -> None:
    ours, is_broken = orthonormal(torch.zeros(2, 6, 3), 1e-6)
    assert deviation(ours) < 1e-6 and not is_broken


# --- one replica


def alone(shards: Any, **options: Any) -> PowerSGD:
    return PowerSGD(shards, None, 1, PowerSGDConfig(**options), seed=1)


def test_rank_is_no_greater_than_the_smaller_side() -> None:
    shard = MatrixShard("weight", 0, 2, 12, 5, 100, bucket=0)
    assert (shard.short, shard.long, shard.rank) == (5, 12, 5)
    assert shard.numel == 120 and shard.factor_numel == 2 * 5 * 17
    assert MatrixShard("weight", 0, 2, 12, 5, 3, bucket=0).factor_numel == 2 * 3 * 17


@pytest.mark.parametrize(("rows", "columns"), [(24, 60), (60, 24), (24, 24)])
def test_what_remains_is_as_small_as_theory_says(rows: int, columns: int) -> None:
    """Against a singular value decomposition, and the bound for random projections (Halko et al. 2011, Theorem 10.5)."""
    torch.manual_seed(0)
    rank = 8
    left, values, right = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    values = values * 0.5 ** torch.arange(len(values))
    matrix = (left * values) @ right
    piece = matrix.float().flatten()
    compressor = alone([MatrixShard("weight", 0, 1, rows, columns, rank, bucket=0)])
    reduced = compressor.reduce([piece])
    mean = piece.view(rows, columns).double()
    assert torch.linalg.svdvals(mean)[rank] < 1e-5 * values[0], "rank"
    rest = matrix - mean
    assert float(rest.norm()) >= 0.9999 * float(values[rank:].norm()), "better than the best"
    # Its expectation for rank k + p is √(1 + k / (p − 1)) times the best of rank k.
    kept = rank // 2
    assert float(rest.norm()) <= 2 * math.sqrt(1 + kept / (rank - kept - 1)) * float(values[kept:].norm())
    smaller = (mean.t() @ rest) if rows <= columns else (mean @ rest.t())
    assert smaller.abs().max() < 1e-5 * values[0] ** 2, "an orthogonal projection"
    assert float(reduced.squares) == pytest.approx(float(mean.square().sum()), rel=1e-5)
    assert torch.allclose(
        compressor.errors()["weight"].view(rows, columns).double(), rest, atol=1e-5 * float(values[0])
    )


def test_the_columns_follow_the_new_gradient_alone() -> None:
    """What error buffers hold is orthogonal to the random matrix: a gradient that comes again makes the same again."""
    torch.manual_seed(0)
    gradient, other = torch.randn(2, 20 * 30)
    compressor = alone([MatrixShard("weight", 0, 1, 20, 30, 4, bucket=0)])
    made = []
    for piece in (gradient.clone(), gradient.clone(), other.clone(), gradient.clone()):
        compressor.reduce([piece])
        made.append(piece)
    assert torch.allclose(made[0], made[1], atol=1e-4)
    assert not torch.allclose(made[0], made[3], atol=0.1), "columns have turned: something of the buffers comes through"


def test_gradients_of_low_rank_cross_whole() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 20, 4) @ torch.randn(3, 4, 30)
    piece = matrices.flatten()
    alone([MatrixShard("weight", 0, 3, 20, 30, 4, bucket=0)]).reduce([piece])
    assert torch.allclose(piece.view(3, 20, 30), matrices, atol=2e-5)


def test_the_random_matrix_is_a_function_of_seed_and_shard() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(2 * 20 * 30)

    def approximation(seed: int = 1, **changes: Any) -> Tensor:
        shard = MatrixShard(**{"name": "a", "place": "0", "piece": 0, "parts": 2, "rows": 20, "columns": 30} | changes,
                            max_rank=4, bucket=0)  # fmt: skip
        piece = gradient.clone()
        torch.rand(3)  # the global generator does not matter
        PowerSGD([shard], None, 1, PowerSGDConfig(), seed).reduce([piece])
        return piece

    assert torch.equal(approximation(), approximation())
    assert not torch.allclose(approximation(), approximation(seed=2), atol=0.1)
    assert not torch.allclose(approximation(), approximation(name="b"), atol=0.1)
    assert not torch.allclose(approximation(), approximation(place="1"), atol=0.1)
    both = torch.cat([gradient[:600], gradient[:600]])
    PowerSGD([MatrixShard("a", 0, 2, 20, 30, 4, 0)], None, 1, PowerSGDConfig(), 1).reduce([both])
    assert not torch.allclose(both[:600], both[600:], atol=0.1), "matrices of one shard are projected alike"


def test_gradients_in_16_bits_and_other_layouts_are_taken_too() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(3 * 12 * 20)
    shard = MatrixShard("weight", 1, 3, 12, 20, 5, bucket=0)
    precise, coarse = gradient.clone(), gradient.bfloat16()
    for pieces in ([torch.ones(2), precise], [torch.ones(2), coarse]):
        alone([shard]).reduce(pieces)
    assert torch.allclose(coarse.float(), precise, atol=0.05)


def test_what_the_format_of_error_buffers_cannot_hold_stays_finite() -> None:
    piece = torch.full((12 * 20,), 1e6)
    piece[::7] *= -1
    compressor = alone([MatrixShard("weight", 0, 1, 12, 20, 1, bucket=0)], storage="1-6-9")
    assert not compressor.reduce([piece]).overflowed.any()
    assert compressor.errors()["weight"].abs().max() < 16


# --- jobs in turns


def test_jobs_begin_one_after_the_other_and_overlap() -> None:
    log: list[str] = []

    def job(name: str, stops: int) -> Any:
        for number in range(stops + 1):
            log.append(f"{name}{number}")
            if number < stops:
                yield

    in_turns(job(name, stops) for name, stops in (("a", 2), ("b", 0), ("c", 1), ("d", 2)))
    assert log == ["a0", "b0", "a1", "c0", "a2", "d0", "c1", "d1", "d2"]
    in_turns(iter(()))


# --- replicas that are processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes found."""
    folder = tmp_path_factory.mktemp("replicas")
    torch.multiprocessing.spawn(worker.work, (str(folder),), nprocs=worker.WORLD)
    return [torch.load(Path(folder) / f"rank-{rank}.pt", weights_only=False) for rank in range(worker.WORLD)]


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_full_rank_is_the_mean(found: list[dict[str, Any]], replicas: int) -> None:
    expected = mean_gradients(replicas, 0)
    for rank in range(replicas):
        made, said = found[rank]["full rank"][replicas]
        for name, square in zip(NAMES, said["squares"], strict=True):
            assert (made[name] - expected[name]).norm() < 1e-5 * expected[name].norm()
            assert square == pytest.approx(float(expected[name].square().sum()), rel=1e-5)


@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize("formats", FORMATS)
def test_all_replicas_make_the_same_to_the_bit(
    found: list[dict[str, Any]], formats: tuple[str, str], replicas: int
) -> None:
    first, _ = found[0]["many updates"][replicas][formats]
    for rank in range(1, replicas):
        for (ours, said), (theirs, also_said) in zip(
            first, found[rank]["many updates"][replicas][formats][0], strict=True
        ):
            assert all(torch.equal(ours[name], theirs[name]) for name in NAMES)
            assert said["squares"] == also_said["squares"]


@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize("formats", FORMATS)
def test_nothing_is_lost(found: list[dict[str, Any]], formats: tuple[str, str], replicas: int) -> None:
    """All Ĝ and what is left add up to all mean gradients, also where factors cross in 16 bits."""
    made, errors = found[0]["many updates"][replicas][formats]
    for shard, name in enumerate(NAMES):
        given = sum(mean_gradients(replicas, update)[name] for update in range(UPDATES))
        got = sum(mean[name].double() for mean, _ in made)
        assert errors[name].norm() > 0.05 * given.norm(), "too little is left to show anything"
        precision = 1e-6 if formats[0] == "fp32" else 2e-3  # 2^-10 of what is stored, each time
        assert (got + errors[name] - given).norm() < precision * given.norm()
        for mean, said in made:
            assert not said["overflowed"][shard] and not said["zeroed"][shard]
            assert said["squares"][shard] == pytest.approx(float(mean[name].double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_factors_in_16_bits_are_nearly_those_in_32(found: list[dict[str, Any]], replicas: int) -> None:
    (precise, _), (coarse, _) = (
        found[0]["many updates"][replicas]["fp32", transport] for transport in ("fp32", "1-6-9")
    )
    for name in NAMES:
        difference = float((precise[0][0][name] - coarse[0][0][name]).norm() / precise[0][0][name].norm())
        assert 1e-5 < difference < 1e-2


@pytest.mark.parametrize("storage", ["fp32", "1-6-9"])
def test_error_buffers_move_to_another_number_of_replicas(found: list[dict[str, Any]], storage: str) -> None:
    for rank in range(worker.WORLD):
        sums, moved, following, partly = found[rank]["other number"][storage]
        precision = 1e-6 if storage == "fp32" else 3e-3
        assert set(moved) == set(NAMES)
        for shard in SHARDS:
            name = shard.name
            assert moved[name].shape == (shard.numel,)
            assert (moved[name] - sums[name]).norm() <= precision * sums[name].norm()
            # Which replica holds which part of the errors does not matter.
            size = following["four"][name].norm()
            assert (following["two"][name] - following["four"][name]).norm() < 10 * precision * size
            assert (following["without"][name] - following["four"][name]).norm() > 0.02 * size
            assert partly[name].any() == (name == "tall")


def faults(found: list[dict[str, Any]]) -> list[tuple[str, int, Any]]:
    return [(name, rank, case) for rank in (0, 1) for name, case in found[rank]["not finite"].items()]


def test_what_is_not_finite_anywhere_is_known_everywhere(found: list[dict[str, Any]]) -> None:
    expected = [shard == TALL for shard in range(len(SHARDS))]
    for name, rank, (_, made, said, _, _) in faults(found):
        assert said["overflowed"] == expected, (name, rank)
        assert [not math.isfinite(square) for square in said["squares"]] == expected, (name, rank)
        assert said["zeroed"] == [False] * len(SHARDS), (name, rank)
        assert all(made[other].isfinite().all() for other in NAMES if other != "tall"), (name, rank)
        assert not made["tall"].isfinite().any(), (name, rank)


def test_error_buffers_outlive_what_is_not_finite(found: list[dict[str, Any]]) -> None:
    for name, rank, (before, _, _, after, (made, said)) in faults(found):
        assert torch.equal(before["tall"], after["tall"]) and before["tall"].any(), (name, rank)
        assert all(not torch.equal(before[other], after[other]) for other in NAMES if other != "tall"), (name, rank)
        assert not any(said["overflowed"]) and all(made[shard].isfinite().all() for shard in NAMES), (name, rank)


def test_factors_that_the_format_cannot_hold_are_found_out(found: list[dict[str, Any]]) -> None:
    for factor in ("p_scale_log2", "q_scale_log2"):
        tried = [entry for entry in found[0]["scales"] if entry[0] == factor]
        others = [entry for entry in found[1]["scales"] if entry[0] == factor]
        assert [flag for _, _, flag, _ in tried] == [flag for _, _, flag, _ in others]
        assert not any(flag for _, log2, flag, _ in tried if log2 == -8)
        assert all(flag for _, log2, flag, _ in tried if log2 == 7)
        assert all(distance < 0.02 for _, _, flag, distance in tried if not flag), "held, but wrong"


def test_an_error_buffer_that_is_not_finite_becomes_0_alone(found: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        errors, said, after, (_, next_said) = found[rank]["broken buffer"]
        assert said["overflowed"] == [name == "wide" for name in NAMES]
        assert said["zeroed"] == [name == "wide" and rank == 1 for name in NAMES]
        # The other replica's half is left.
        assert torch.allclose(after["wide"], errors["wide"] / 2, atol=1e-6) and errors["wide"].any()
        assert not any(next_said["overflowed"]) and not any(next_said["zeroed"])


def test_factors_of_a_block_cross_together_while_those_of_the_next_are_computed(found: list[dict[str, Any]]) -> None:
    blocks: dict[int, list[MatrixShard]] = {}
    for shard in SHARDS:
        blocks.setdefault(shard.bucket, []).append(shard)
    p = [sum(s.parts * s.short * s.rank for s in shards) for shards in blocks.values()]
    q = [sum(s.parts * s.long * s.rank for s in shards) for shards in blocks.values()]
    assert sum(p) + sum(q) == sum(shard.factor_numel for shard in SHARDS)
    reduce = "all_reduce"
    assert found[0]["collectives"]["fp32"] == found[1]["collectives"]["fp32"] == [
        ("begin", reduce, p[0]),
        ("begin", reduce, p[1]), ("wait", reduce, p[0]), ("begin", reduce, q[0]),
        ("begin", reduce, p[2]), ("wait", reduce, p[1]), ("begin", reduce, q[1]), ("wait", reduce, q[0]),
        ("wait", reduce, p[2]), ("begin", reduce, q[2]), ("wait", reduce, q[1]),
        ("wait", reduce, q[2]),
    ]  # fmt: skip
    log = found[0]["collectives"]["1-6-9"]
    assert log == found[1]["collectives"]["1-6-9"]
    scattered = [n for event, name, n in log if (event, name) == ("begin", "all_to_all_single")]
    gathered = [n for event, name, n in log if (event, name) == ("begin", "all_gather_into_tensor")]
    # In bytes, two for an element, for a number of elements that two replicas can share; half of it is gathered from each.
    assert sorted(scattered) == sorted(2 * (n + n % 2) for n in p + q)
    assert sorted(gathered) == sorted(n + n % 2 for n in p + q)


def test_what_does_not_fit_comes_through_later(found: list[dict[str, Any]]) -> None:
    """Low rank reaches what it would without compression, thanks to the error buffers; without them it is far behind."""
    for rank in (0, 1):
        distances = found[rank]["regression"]
        assert distances["plain"] < 1e-3
        assert distances["low rank"] < 0.02
        assert distances["nothing kept"] > 0.1


@pytest.mark.parametrize("storage", ["fp32", "1-6-9"])
def test_what_is_given_back_comes_later(storage: Literal["fp32", "1-6-9"]) -> None:
    """Over updates some of which are not made, what was applied and what is left add up to all gradients."""
    shard = MatrixShard("w", 0, 2, 24, 40, 6, 0)
    compressor = PowerSGD([shard], None, 1, PowerSGDConfig(enabled=True, storage=storage), seed=3)
    generator = torch.Generator().manual_seed(0)
    applied, all_of_them = torch.zeros(shard.numel), torch.zeros(shard.numel)
    for update in range(12):
        gradient = torch.randn(shard.numel, generator=generator)
        all_of_them += gradient
        pieces = [gradient.clone()]
        compressor.reduce(pieces)
        if update % 4 == 1:
            compressor.restore_error_feedback([0], pieces)
        else:
            applied += pieces[0]
    missing = applied + compressor.errors()["w"] - all_of_them
    assert missing.norm() < (1e-5 if storage == "fp32" else 1e-2) * all_of_them.norm()


def test_what_is_not_finite_is_not_given_back() -> None:
    shard = MatrixShard("w", 0, 1, 24, 40, 6, 0)
    compressor = PowerSGD([shard], None, 1, PowerSGDConfig(enabled=True), seed=3)
    compressor.reduce([torch.randn(shard.numel)])
    before = compressor.errors()["w"]
    pieces = [torch.full((shard.numel,), math.inf)]
    assert math.isnan(compressor.reduce(pieces).squares[0]), "the gradient itself was not finite"
    compressor.restore_error_feedback([0], pieces)
    assert torch.equal(compressor.errors()["w"], before)


def test_a_factor_that_leaves_its_format_is_told_from_a_gradient_that_is_not_finite() -> None:
    shard = MatrixShard("w", 0, 1, 24, 40, 6, 0)
    compressor = PowerSGD([shard], None, 1, PowerSGDConfig(enabled=True), seed=3)
    assert math.isinf(compressor.reduce([torch.full((shard.numel,), 3e38)]).squares[0])
