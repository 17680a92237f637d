"""Reranking: the best of candidates that do not depend on chunks, in bounded memory; scores that are used again."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from dalle_ds.config import ClipConfig
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.sets import ImageFolder
from dalle_ds.models.clip import Clip
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.dvae import DiscreteVAE
from dalle_ds.sampling import (
    ClipReranker,
    Progress,
    Sampling,
    SamplingRequest,
    TextToImage,
    candidates,
    command,
    rank_candidates,
    sample_codes,
)
from dalle_ds.sampling import codes as drawing
from dalle_ds.sampling.codes import sample_batches
from dalle_ds.sampling.command import show_progress
from dalle_ds.sampling.completion import open_image, top_rows
from dalle_ds.text.clip_tokenizer import ClipTokenizer
from dalle_ds.text.tokenizer import Tokenizer
from tests.conftest import ROOT, TINY_DALLE
from tests.processes import run_ranks
from tests.sampling.two_processes import results

WORKER = Path(__file__).with_name("two_processes.py")
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def pipe(dvae_export: Path, tokenizer_file: Path) -> TextToImage:
    torch.manual_seed(0)
    model = Dalle(TINY_DALLE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return TextToImage(model, DiscreteVAE.from_pretrained(dvae_export), Tokenizer.load(tokenizer_file))


def make_clip(tokenizer_file: Path, seed: int) -> Clip:
    torch.manual_seed(seed)
    tokenizer = ClipTokenizer.load(tokenizer_file)
    towers = {"vision_width": 16, "vision_depth": 1, "vision_heads": 2, "text_width": 16, "text_depth": 1}
    config = ClipConfig(
        embed_dim=8, image_size=16, patch_size=8, text_heads=2, text_len=8, text_vocab=tokenizer.end + 1, **towers
    )
    clip = Clip(config, tokenizer=tokenizer).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return clip


@pytest.fixture(scope="module")
def clip(tokenizer_file: Path) -> Clip:
    return make_clip(tokenizer_file, 0)


def brightness(prompt: str, images: list[Image.Image]) -> list[float]:
    return [float(np.asarray(image, dtype=np.float64).mean()) for image in images]


def same(left: list[Image.Image], right: list[Image.Image]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def drawn_pictures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Filled with (prompt, number) of whatever is drawn by ranking from now on."""
    seen: list[tuple[int, int]] = []
    draw = candidates.sample_batches
    monkeypatch.setattr(
        candidates, "sample_batches", lambda *given, **named: seen.extend(given[2]) or draw(*given, **named)
    )
    return seen


def test_candidates_are_the_images_of_generate(pipe: TextToImage) -> None:
    """In their order, in batches of any size, and continued where an earlier request ended."""
    text = pipe.encode(PROMPTS)
    expected = sample_codes(pipe.model, text, SamplingRequest(num=7, seed=3))
    for size, first in ((None, 0), (1, 5), (4, 0), (8, 3)):
        wanted = [(prompt, number) for prompt in range(2) for number in range(first, 7)]
        found, codes = [], []
        for drawn in sample_batches(pipe.model, text, wanted, SamplingRequest(seed=3, batch_size=size)):
            assert len(drawn.codes) == len(drawn.images) <= (size or 14)
            found += drawn.images
            codes.append(drawn.codes)
        assert found == wanted
        assert torch.equal(torch.cat(codes).view(2, 7 - first, -1), expected[:, first:])
    assert not list(sample_batches(pipe.model, text, [], SamplingRequest()))


@pytest.mark.parametrize("chunk", [3, 8, None])
def test_the_best_of_all_are_kept(pipe: TextToImage, chunk: int | None) -> None:
    sampling = Sampling(0.9, guidance=2.0)
    everything = pipe.generate(PROMPTS, num=10, temperature=0.9, guidance=2.0, seed=1)
    rankings = rank_candidates(
        pipe, PROMPTS, SamplingRequest(num=10, sampling=sampling, seed=1, batch_size=chunk), brightness, keep=3
    )
    for prompt, ranking, pictures in zip(PROMPTS, rankings, everything, strict=True):
        assert ranking.prompt == prompt
        assert ranking.scores == brightness(prompt, pictures)
        best = sorted(range(10), key=lambda number: -ranking.scores[number])[:3]
        assert [one.number for one in ranking.kept] == best == ranking.best(3)
        assert [one.score for one in ranking.kept] == [ranking.scores[number] for number in best]
        assert same([one.image for one in ranking.kept], [pictures[number] for number in best])
        assert same(pipe.decode(torch.stack([one.codes for one in ranking.kept])), [one.image for one in ranking.kept])
    kept = pipe.generate(PROMPTS, 10, 0.9, guidance=2.0, seed=1, rerank=brightness, keep=3, batch_size=chunk)
    assert all(same(row, [one.image for one in ranking.kept]) for row, ranking in zip(kept, rankings, strict=True))


def test_the_first_of_equals_is_kept(pipe: TextToImage) -> None:
    for chunk in (2, None):
        (ranking,) = rank_candidates(
            pipe,
            "a red circle",
            SamplingRequest(num=6, batch_size=chunk),
            lambda _, images: [0.5] * len(images),
            keep=2,
        )
        assert [one.number for one in ranking.kept] == [0, 1]


def test_memory_has_a_chunk_and_what_is_kept(pipe: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are alive at once, whatever their number; and rows of the caches."""
    alive: set[int] = set()
    most, count, rows = 0, 0, set()
    decode, new_cache = TextToImage.decode, drawing.new_cache

    def counted(self: TextToImage, codes: Tensor) -> list[Image.Image]:
        nonlocal most, count
        pictures = decode(self, codes)
        for picture in pictures:
            count += 1
            alive.add(number := count)
            weakref.finalize(picture, alive.discard, number)
        most = max(most, len(alive))
        return pictures

    monkeypatch.setattr(TextToImage, "decode", counted)
    monkeypatch.setattr(drawing, "new_cache", lambda *given: rows.add((cache := new_cache(*given)).rows) or cache)
    rank_candidates(pipe, "a red circle", SamplingRequest(num=64, batch_size=8), brightness, keep=2)
    assert count == 64
    assert most <= 8 + 8 + 2  # one chunk may still be alive while the next is decoded
    assert rows == {1, 8}
    known = {"a red circle": [float(number) for number in range(60)]}
    for ranking in (
        *rank_candidates(pipe, "a red circle", SamplingRequest(num=64, batch_size=8), brightness, keep=2),
        *rank_candidates(pipe, "a red circle", SamplingRequest(num=64, batch_size=8), brightness, keep=64, known=known),
    ):
        for one in ranking.kept:  # and no codes but its own
            assert one.codes.untyped_storage().nbytes() == one.codes.nbytes == 8 * TINY_DALLE.image_len


def test_known_candidates_are_not_drawn_again(pipe: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those of them that are kept: they are the same images."""
    expected = rank_candidates(pipe, PROMPTS, SamplingRequest(num=12), brightness, keep=4)
    known = {PROMPTS[0]: expected[0].scores[:7], PROMPTS[1]: expected[1].scores}
    seen, asked = drawn_pictures(monkeypatch), []
    scored = lambda prompt, images: asked.append(len(images)) or brightness(prompt, images)  # noqa: E731
    found = rank_candidates(pipe, PROMPTS, SamplingRequest(num=12), scored, keep=4, known=known)
    for ranking, other in zip(found, expected, strict=True):
        assert ranking.scores == other.scores
        assert [(one.number, one.score) for one in ranking.kept] == [(one.number, one.score) for one in other.kept]
        assert same([one.image for one in ranking.kept], [one.image for one in other.kept])
    old = {(0, one.number) for one in expected[0].kept if one.number < 7} | {
        (1, one.number) for one in expected[1].kept
    }
    assert set(seen) == {(0, number) for number in range(7, 12)} | old
    assert len(seen) == 5 + len(old)
    assert sum(asked) == 5
    fewer = rank_candidates(pipe, PROMPTS, SamplingRequest(num=3), scored, keep=1, known=known)
    assert [ranking.scores for ranking in fewer] == [ranking.scores[:3] for ranking in expected]


def test_clip_scores_are_cosines(pipe: TextToImage, clip: Clip) -> None:
    pictures = pipe.generate("a red circle", num=9)[0]
    of_text = clip.embed_texts(["a red circle"])
    expected = torch.cosine_similarity(torch.cat([clip.embed_images([picture]) for picture in pictures]), of_text)
    for batch_size in (1, 4, 64):
        found = ClipReranker(clip, batch_size)("a red circle", pictures)
        assert found == pytest.approx(expected.tolist(), abs=2e-6)
        assert all(score == round(score, 6) for score in found)
    assert len(set(found)) == 9
    reranker, other = ClipReranker(clip), ClipReranker(clip)("a blue square", pictures)
    assert other != found
    for prompt, scores in (("a red circle", found), ("a blue square", other), ("a red circle", found)):
        assert reranker(prompt, pictures) == scores  # of this prompt, whichever was asked for before
    ranked = pipe.generate("a red circle", num=9, rerank=clip, keep=4)[0]
    assert same(ranked, [pictures[number] for number in np.argsort(-np.array(found), kind="stable")[:4]])


def test_mistakes_are_named(pipe: TextToImage, clip: Clip) -> None:
    for keep in (0, 4):
        with pytest.raises(ConfigError, match=f"at most num=3, found {keep}"):
            pipe.generate(PROMPTS, num=3, rerank=brightness, keep=keep)
    with pytest.raises(ConfigError, match="keep=2 takes the best by rerank"):
        pipe.generate(PROMPTS, num=3, keep=2)
    with pytest.raises(ConfigError, match="num must be at least 1"):
        pipe.generate(PROMPTS, num=0, rerank=brightness)
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        ClipReranker(clip, 0)
    with pytest.raises(ConfigError, match="no tokenizer"):
        ClipReranker(Clip(clip.config))
    with pytest.raises(DataError, match="not a number"):
        pipe.generate("a", num=2, rerank=lambda _, images: [float("nan")] * len(images))


# --- the launcher and its file


@pytest.fixture(scope="module")
def folders(pipe: TextToImage, clip: Clip, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pipe.save_pretrained(folder / "transformer")
    clip.save_pretrained(folder / "clip")
    make_clip(tokenizer_file, 1).save_pretrained(folder / "another_clip")
    Image.new("RGB", (20, 20), "red").save(folder / "red.png")
    return folder


@pytest.fixture
def launch(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run generate.py in this process: status, and what it wrote."""

    def run(*options: str, out: str = "cats.png", clip: str | None = "clip") -> tuple[int, str]:
        command = ["generate.py", "--model", str(folders / "transformer"), "--out", str(tmp_path / out)]
        command += [] if clip is None else ["--rerank", str(folders / clip)]
        command += [] if "--dtype" in options else ["--dtype", "fp32"]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        try:
            runpy.run_path(str(ROOT / "launchers" / "generate.py"), run_name="__main__")
        except SystemExit as stop:
            captured = capsys.readouterr()
            return int(stop.code or 0), captured.out + captured.err
        return 0, capsys.readouterr().out

    return run


def test_the_launcher_keeps_scores(
    launch: Callable[..., tuple[int, str]],
    pipe: TextToImage,
    clip: Clip,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    assert launch(*prompts, "--num", "6", "--keep", "2", "--batch_size", "4")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cats.json", "cats.png"]
    content = json.loads((tmp_path / "cats.json").read_text())
    rankings = rank_candidates(pipe, PROMPTS, SamplingRequest(num=6), clip, keep=2)
    assert content["of"] == {
        **pipe.fingerprints(), "clip": clip.fingerprint, "dtype": "fp32", "device": "cpu", "processes": 1, "seed": 0,
        "temperature": 1.0, "top_k": None, "top_p": None, "guidance": 1.0, "given_codes": None,
    }  # fmt: skip
    assert content["prompts"] == [
        {"prompt": ranking.prompt, "kept": [one.number for one in ranking.kept], "scores": ranking.scores}
        for ranking in rankings
    ]
    sheet = np.asarray(Image.open(tmp_path / "cats.png"))
    for row, ranking in enumerate(rankings):
        for column, one in enumerate(ranking.kept):
            top, left = 12 + row * (sheet.shape[0] - 12) // 2, 204 + column * 140
            cell = sheet[top : top + 128, left : left + 128]
            assert np.array_equal(cell, np.asarray(one.image).repeat(8, axis=0).repeat(8, axis=1))
            assert (sheet[top + 128 : top + 147, left : left + 128] < 200).any()  # its score, below

    seen = drawn_pictures(monkeypatch)
    assert launch(*prompts, "--num", "9", "--keep", "3")[0] == 0
    more = rank_candidates(pipe, PROMPTS, SamplingRequest(num=9), clip, keep=3)
    content = json.loads((tmp_path / "cats.json").read_text())
    assert [entry["scores"] for entry in content["prompts"]] == [ranking.scores for ranking in more]
    assert [entry["kept"] for entry in content["prompts"]] == [[one.number for one in ranking.kept] for ranking in more]
    again = sum(one.number < 6 for ranking in more for one in ranking.kept)
    assert len(seen) - 18 == 2 * 3 + again  # 18 by the lines above

    # Another prompt joins, and fewer candidates forget nothing.
    assert launch("--prompt", "a green triangle", "--num", "2", "--keep", "1")[0] == 0
    joined = json.loads((tmp_path / "cats.json").read_text())
    assert joined["prompts"][:2] == content["prompts"]
    assert [len(entry["scores"]) for entry in joined["prompts"]] == [9, 9, 2]


def test_scores_of_anything_else_are_refused(
    launch: Callable[..., tuple[int, str]], folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch("--prompt", "a", "--num", "2")[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    seen = drawn_pictures(monkeypatch)
    for options, named in (
        (["--seed", "1"], "seed: 0 there, 1 now"),
        (["--top_k", "5"], "top_k: None there, 5 now"),
        (["--dtype", "bf16"], "dtype: fp32 there, bf16 now"),
        (["--device", "auto"], "device: cpu there, auto, cpu now"),
        (["--init_image", str(folders / "red.png")], "given_codes: None there"),
    ):
        status, said = launch("--prompt", "a", "--num", "3", *options)
        assert status == 1 and named in said
    status, said = launch("--prompt", "a", "--num", "3", clip="another_clip")
    assert status == 1 and "another CLIP (clip: " in said
    (tmp_path / "other.json").write_text('{"kind": "something else"}')
    status, said = launch("--prompt", "a", "--scores", str(tmp_path / "other.json"))
    assert status == 1 and "other.json exists and holds no scores" in said
    content = json.loads(before["cats.json"])
    for broken in (
        {"scores": [0.5, float("nan")]},
        {"scores": [None]},
        {"scores": [10**400]},
        {"scores": "no"},
        {"scores": [True]},
        {"kept": [2]},
        {"kept": [True]},
        {"kept": [-1]},
        {"prompt": 7},
        {"prompt": "\ud83d"},
    ):
        damaged = {**content, "prompts": [{**content["prompts"][0], **broken}]}
        (tmp_path / "other.json").write_text(json.dumps(damaged))
        status, said = launch("--prompt", "a", "--scores", str(tmp_path / "other.json"))
        assert status == 1 and "are damaged" in said
    (tmp_path / "other.json").write_text("{")
    status, said = launch("--prompt", "a", "--scores", str(tmp_path / "other.json"))
    assert status == 1 and "cannot be read" in said
    assert not seen
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "other.json"} == before


def test_a_draw_that_was_cut_off_goes_on(
    launch: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are written after every chunk."""
    calls: list[int] = []
    score = ClipReranker.__call__

    def cut_off(self: ClipReranker, prompt: str, images: list[Image.Image]) -> list[float]:
        calls.append(len(images))
        if len(calls) == 3:
            raise DataError("cut off")
        return score(self, prompt, images)

    with monkeypatch.context() as patch:
        patch.setattr(ClipReranker, "__call__", cut_off)
        status, said = launch("--prompt", "a", "--num", "16", "--batch_size", "4")
    assert status == 1 and "cut off" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cats.json"]
    seen = drawn_pictures(monkeypatch)
    assert launch("--prompt", "a", "--num", "16", "--batch_size", "4", "--keep", "1")[0] == 0
    assert seen[:8] == [(0, number) for number in range(8, 16)]
    assert len(seen) <= 9
    assert launch("--prompt", "a", "--num", "16", "--keep", "1", out="whole.png")[0] == 0
    assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "cats.json").read_bytes()
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "cats.png").read_bytes()

    # What the file says is kept is the best of all that it has scores of, those of an earlier command included.
    calls[:] = [0]
    with monkeypatch.context() as patch:
        patch.setattr(ClipReranker, "__call__", cut_off)
        status, said = launch("--prompt", "a", "--num", "24", "--batch_size", "4", "--keep", "3")
    assert status == 1 and "cut off" in said
    (entry,) = json.loads((tmp_path / "cats.json").read_text())["prompts"]
    assert len(entry["scores"]) == 20
    assert entry["kept"] == np.argsort(-np.array(entry["scores"]), kind="stable")[:3].tolist()
    assert min(entry["kept"]) < 16  # or it would be the same without the earlier ones


def test_the_launcher_completes(
    launch: Callable[..., tuple[int, str]], folders: Path, tmp_path: Path, pipe: TextToImage, clip: Clip
) -> None:
    red = ["--init_image", str(folders / "red.png")]
    assert launch("--prompt", "a", "--num", "2", "--init_rows", "2", *red, clip=None)[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "cats.png"))
    assert (sheet[12:140, 204:332] == (255, 0, 0)).all()  # the image itself comes first
    expected = pipe.generate("a", image=folders / "red.png", rows=2, num=2)[0]
    for column, picture in enumerate(expected, start=1):
        cell = sheet[12:140, 204 + column * 140 : 332 + column * 140]
        assert np.array_equal(cell, np.asarray(picture).repeat(8, axis=0).repeat(8, axis=1))
    best = ["--prompt", "a", "--num", "5", "--keep", "2", *red]
    assert launch(*best, out="best.png")[0] == 0
    assert launch(*best, "--init_rows", "3", out="best.png")[0] == 1
    given = top_rows(pipe.dvae, open_image(folders / "red.png", 16)).expand(1, -1)
    (ranking,) = rank_candidates(pipe, "a", SamplingRequest(num=5, given=given), clip, keep=2)
    (entry,) = json.loads((tmp_path / "best.json").read_text())["prompts"]
    assert entry == {"prompt": "a", "kept": [one.number for one in ranking.kept], "scores": ranking.scores}
    assert entry["scores"] != rank_candidates(pipe, "a", SamplingRequest(num=5), clip)[0].scores


def test_the_launcher_ranks_what_was_asked_for(
    launch: Callable[..., tuple[int, str]], tmp_path: Path, pipe: TextToImage, clip: Clip
) -> None:
    options = ["--seed", "3", "--temperature", "0.9", "--top_k", "20", "--top_p", "0.95", "--guidance", "2"]
    assert launch("--prompt", "a", "--num", "4", *options)[0] == 0
    expected = rank_candidates(pipe, "a", SamplingRequest(num=4, seed=3, sampling=Sampling(0.9, 20, 0.95, 2.0)), clip)
    (entry,) = json.loads((tmp_path / "cats.json").read_text())["prompts"]
    assert entry["scores"] == expected[0].scores


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--init_rows", "2"], "name it with --init_image"),
        (["--init_image", "/nowhere.png"], "/nowhere.png cannot be read"),
        (["--init_image", "{red}", "--init_rows", "9"], "[0, 4] for a grid of 4 rows, found 9"),
        (["--init_image", "{red}", "--init_rows", "-1"], "found -1"),
        (["--keep", "2"], "name a CLIP with --rerank"),
        (["--scores", "s.json"], "name a CLIP with --rerank"),
        (["--rerank", "/nowhere"], "no model at /nowhere"),
        (["--rerank", "{transformer}"], "holds a 'transformer' model"),
        (["--rerank", "{clip}", "--keep", "9"], "at most num=8, found 9"),
        (["--rerank", "{clip}", "--scores", "/nowhere/s.json"], "scores must be a .json file in a folder that exists"),
        (["--prompt", "\udcff"], "has bytes that are no UTF-8"),
    ],
)
def test_the_launcher_says_what_is_wrong(
    launch: Callable[..., tuple[int, str]], folders: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    places = {"red": folders / "red.png", "clip": folders / "clip", "transformer": folders / "transformer"}
    status, said = launch("--prompt", "a", *[option.format(**places) for option in options], clip=None)
    assert status == 1 and words in said and len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.launch
def test_a_tensor_group_ranks_as_one_process_does(folders: Path, tmp_path: Path) -> None:
    """Candidates, completions and the best of both; and processes whose scores differ go on to draw the same."""
    job = {"export": "transformer", "clip": "clip", "picture": "red.png"}
    job = {name: str(folders / path) for name, path in job.items()} | {"out": str(tmp_path)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = run_ranks(WORKER, tmp_path / "job.json", processes=2)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    whole = results(job)
    for name in ("whole", "completed"):
        assert first[name] == whole[name]
        assert len({str(codes) for of_prompt in whole[name]["codes"] for codes in of_prompt}) == 4
    assert first["fingerprints"] == whole["fingerprints"]
    assert [number for number, _ in first["agreed"][0]][:2] == [0, 2]


def test_progress_is_lines_elsewhere_than_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    text = io.StringIO()
    row = lambda done: Progress(((0, 0), (0, 1)), torch.zeros(2, done, dtype=torch.int64))  # noqa: E731
    with show_progress(4, 8, console=Console(file=text)) as shown:
        for second, done in ((5.0, 8), (10.0, 16), (11.0, 8), (19.0, 12), (21.0, 16)):
            clock[0] = second
            shown(row(done))
    assert text.getvalue().splitlines() == [
        "sampling: 2/8 images, 2 codes/s, 70 s left",
        "sampling: 4/8 images, 2 codes/s, 46 s left",
    ]
    more = io.StringIO()  # than was said: candidates of known scores that are drawn again
    with show_progress(4, 1, console=Console(file=more)) as shown:
        clock[0] += 16.0
        shown(row(8))
    assert more.getvalue() == "sampling: 0/2 images, 0 codes/s, 48 s left\n"
    rest = io.StringIO()
    with show_progress(4, 2, given_rows=2, console=Console(file=rest)) as shown:
        clock[0] += 16.0
        shown(row(12))
    assert rest.getvalue() == "sampling: 0/2 images, 0 codes/s, 16 s left\n"
    silent = io.StringIO()
    with show_progress(4, 8, console=Console(file=silent), enabled=False) as shown:
        clock[0] = 100.0
        shown(row(16))
    assert not silent.getvalue()
    on_terminal = io.StringIO()
    with show_progress(4, 2, console=Console(file=on_terminal, force_terminal=True, width=100)) as shown:
        shown(row(16))
    assert "sampling" in on_terminal.getvalue() and "2/2 images" in on_terminal.getvalue()


def test_a_folder_of_pictures(
    launch: Callable[..., tuple[int, str]], tmp_path: Path, pipe: TextToImage, clip: Clip
) -> None:
    """For what measures images, and for studies: prompts from a file, one image a file, and what they were drawn for."""
    (tmp_path / "prompts.txt").write_text("a blue square\n\n  a green triangle  \n")
    prompts = ["--prompt", PROMPTS[0], "--prompts", str(tmp_path / "prompts.txt")]
    assert launch(*prompts, "--num", "2", out="pictures", clip=None)[0] == 0
    every = [PROMPTS[0], "a blue square", "a green triangle"]
    expected = [picture for row in pipe.generate(every, num=2) for picture in row]
    listed = json.loads((tmp_path / "pictures" / "pictures.json").read_text())
    assert [(entry["caption"], entry["number"]) for entry in listed] == [
        (prompt, n) for prompt in every for n in (0, 1)
    ]
    assert same([Image.open(tmp_path / "pictures" / entry["picture"]) for entry in listed], expected)
    generated = ImageFolder(tmp_path / "pictures")  # what evaluate.py --fake reads
    assert same([generated.read(row, 16)[0] for row in range(len(generated))], expected)
    assert launch(*prompts, "--num", "5", "--keep", "1", out="pictures")[0] == 0  # in the place of the former
    best = rank_candidates(pipe, every, SamplingRequest(num=5), clip, keep=1)
    listed = json.loads((tmp_path / "pictures" / "pictures.json").read_text())
    assert len(list((tmp_path / "pictures").iterdir())) == 4
    for entry, ranking in zip(listed, best, strict=True):
        assert (entry["number"], entry["score"]) == (ranking.kept[0].number, ranking.kept[0].score)
        assert np.array_equal(Image.open(tmp_path / "pictures" / entry["picture"]), ranking.kept[0].image)
    assert len(json.loads((tmp_path / "pictures.json").read_text())["prompts"]) == 3  # the scores, beside it

    for file, words in (("pictures/s.json", "is replaced as a whole"), ("pictures/../s.json", "")):
        status, said = launch(*prompts, "--num", "2", "--scores", str(tmp_path / file), out="pictures")
        assert (status == 1 and words in said) if words else status == 0
    (tmp_path / "s.json").unlink()
    (tmp_path / "of_another").mkdir()
    shutil.copy(tmp_path / "pictures" / "00000-000.png", tmp_path / "of_another")  # named as ours, and no list of ours
    before = sorted(tmp_path.iterdir())
    (tmp_path / "bad.txt").write_text("one\none\n")
    for options, out, words in (
        ([], "x.png", "nothing to generate: give --prompt"),
        (["--prompts", "/nowhere"], "x.png", "/nowhere cannot be read"),
        (["--prompts", str(tmp_path / "bad.txt")], "x.png", "the caption 'one' twice"),
        (["--prompt", "a"], ".", "folder with other things"),
        (["--prompt", "a"], "of_another", "folder with other things"),
        (["--prompt", "a"], "pictures/..", "a name without a suffix"),
        (["--prompt", "a"], "x.jpg", "must be a .png file in a folder that exists, or a name without a suffix"),
    ):
        status, said = launch(*options, out=out, clip=None)
        assert status == 1 and words in said
    (tmp_path / "bad.txt").unlink()
    assert sorted(tmp_path.iterdir()) == before
