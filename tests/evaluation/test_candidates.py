"""Candidates: the same ones for every n, kept and found again, and never taken for others."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from dalle_ds.errors import ConfigError
from dalle_ds.evaluation import candidates as candidates_module
from dalle_ds.evaluation.candidates import CAPTIONS, PROTOCOL_NAME, Candidates, best_of, kept_precision
from dalle_ds.evaluation.sets import shard_rows
from dalle_ds.models import Dalle
from dalle_ds.parallel import Mesh
from dalle_ds.precision import choice
from dalle_ds.sampling import Sampling, SamplingRequest, TextToImage

TEXTS = [f"a {colour} circle" for colour in ("red", "green", "blue", "orange", "purple", "black")]
ALONE = Mesh(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def pipeline(transformer_export: Path) -> TextToImage:
    return TextToImage.from_pretrained(transformer_export)


def make(pipeline: TextToImage, folder: Path | None = None, **changes: object) -> Candidates:
    options: dict = {"num": 3, "sampling": Sampling(), "seed": 5, **changes}
    candidates = Candidates(pipeline, options.pop("captions", TEXTS), SamplingRequest(**options), folder)
    candidates.prepare("fp32", "weights")
    return candidates


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images are sampled from now on, by call."""
    counts: list[int] = []
    sample_codes = candidates_module.sample_codes

    def counted(model: Dalle, text: torch.Tensor, request: SamplingRequest) -> torch.Tensor:
        counts.append(len(text) * request.num)
        return sample_codes(model, text, request)

    monkeypatch.setattr(candidates_module, "sample_codes", counted)
    return counts


def all_codes(candidates: Candidates) -> torch.Tensor:
    return torch.cat([candidates.codes(rows) for rows in shard_rows(len(candidates.captions), ALONE, chunk=CAPTIONS)])


def test_the_best_of_the_first_n() -> None:
    scores = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.5, 0.5, 0.1, 0.2]])
    assert [best_of(scores, n).tolist() for n in (1, 2, 3, 4)] == [[0, 0], [1, 0], [1, 0], [3, 0]]


def test_fewer_candidates_are_the_first_of_more(pipeline: TextToImage) -> None:
    assert torch.equal(all_codes(make(pipeline, num=5))[:, :3], all_codes(make(pipeline)))


def test_kept_candidates_are_found_again(pipeline: TextToImage, tmp_path: Path, sampled: list[int]) -> None:
    codes = all_codes(make(pipeline, tmp_path / "kept"))
    assert sum(sampled) == 18
    assert torch.equal(all_codes(make(pipeline, tmp_path / "kept")), codes)
    assert sum(sampled) == 18
    assert torch.equal(codes, all_codes(make(pipeline)))


def test_a_damaged_file_is_sampled_again(pipeline: TextToImage, tmp_path: Path, sampled: list[int]) -> None:
    codes = all_codes(make(pipeline, tmp_path))
    kept = sorted(tmp_path.glob("*.safetensors"))
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:-40])
    sampled.clear()
    assert torch.equal(all_codes(make(pipeline, tmp_path)), codes) and sum(sampled) == 12


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num", 4, "num: 3 and 4"),
        ("seed", 6, "seed: 5 and 6"),
        ("sampling", Sampling(temperature=0.5), "sampling.temperature: 1.0 and 0.5"),
        ("captions", TEXTS[::-1], "captions: "),
    ],
)
def test_other_candidates_are_refused(
    pipeline: TextToImage, tmp_path: Path, name: str, value: object, words: str
) -> None:
    make(pipeline, tmp_path)
    with pytest.raises(ConfigError, match=words):
        make(pipeline, tmp_path, **{name: value})


def test_another_transformers_candidates_are_refused(pipeline: TextToImage, tmp_path: Path) -> None:
    candidates = make(pipeline, tmp_path)
    assert isinstance(pipeline.model, Dalle)
    with pytest.raises(ConfigError, match="transformer: 'weights' and 'others'"):
        candidates.prepare("fp32", "others")


def test_the_precision_of_kept_candidates_is_taken_up_again(
    pipeline: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "choose", lambda _: choice.Choice("bf16", "measured"))
    monkeypatch.setattr(choice, "slow_warning", lambda *_: None)
    kept = partial(kept_precision, tmp_path / "kept")
    assert choice.choose_precision("auto", ALONE, kept) == "bf16"
    candidates = make(pipeline, tmp_path / "kept")
    assert choice.choose_precision("auto", ALONE, kept) == "fp32"
    with pytest.raises(ConfigError, match=r"dtype: 'fp32' and .*--dtype fp32$"):
        candidates.prepare(choice.choose_precision("bf16", ALONE, kept), "weights")
    for damaged in ("[", "[]", '{"dtype": []}', '{"dtype": "int8"}', "{}"):
        (tmp_path / "kept" / PROTOCOL_NAME).write_text(damaged)
        assert kept() is None


def test_a_folder_of_something_else_is_left_alone(pipeline: TextToImage, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds something else"):
        make(pipeline, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
