"""A study of preference: pages that betray no model and run no caption, votes that are counted as papers count them."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import binomtest

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.study import (
    CountOptions,
    MakeOptions,
    count_study,
    images_by_caption,
    majority,
    make_study,
    normal_half_width,
    report,
    wilson_interval,
)
from tests.conftest import ROOT

EVIL = '</script><img src=x onerror="document.title=1">&lt;b&gt; \u2028 "quoted" \\ 猫'
HALF = '[{"caption": "\\ud83d", "picture": "p0.png"}]'
CAPTIONS = [EVIL, *[f"caption number {number}" for number in range(1, 12)]]


def picture(model: str, number: int) -> Image.Image:
    """A colour that says whose it is, and what of."""
    return Image.new("RGB", (16, 16), (200 if model == "a" else 20, number * 9, 77))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Images of twelve captions by two models, a.png of A with a comment that names it."""
    for model in ("a", "b"):
        (tmp_path / model).mkdir()
        for number in range(len(CAPTIONS)):
            picture(model, number).save(tmp_path / model / f"p{number}.png")
    (tmp_path / "captions.txt").write_text(
        "\n".join(CAPTIONS[:1]).replace("\u2028", " ") + "\n\n" + "\n".join(CAPTIONS[1:])
    )
    for model in ("a", "b"):
        listed = [{"caption": caption, "picture": f"p{number}.png"} for number, caption in enumerate(CAPTIONS)]
        (tmp_path / f"{model}.json").write_text(json.dumps(listed))
        shutil.copy(tmp_path / f"{model}.json", tmp_path / model / "pictures.json")
    return tmp_path


def make(folders: Path, out: str = "study", **changes: Any) -> dict[str, Any]:
    options = {
        "a": str(folders / "a"),
        "b": str(folders / "b"),
        "out": str(folders / out),
        "pairs_per_page": 5,
    } | changes
    return make_study(MakeOptions(**options))


class Page(HTMLParser):
    """What a browser makes of a page: elements, and the contents of the study's data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.links: list[str] = []
        self.data = ""
        self._inside = False
        self.feed(text)
        self.close()
        self.study = json.loads(self.data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        self._inside = dict(attrs).get("id") == "study"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data


def pages(folders: Path, out: str = "study") -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((folders / out / "pages").iterdir())]


def colour(uri: str) -> tuple[int, int, int]:
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert image.size == (16, 16) and not image.info
    return image.getpixel((3, 3))  # type: ignore[return-value]


def test_each_pair_is_shown_once_with_sides_as_written_down(folders: Path) -> None:
    key = make(folders)
    assert sorted(pair["caption"] for pair in key["pairs"]) == sorted(CAPTIONS)
    assert [pair["page"] for pair in key["pairs"]] == [1] * 5 + [2] * 5 + [3] * 2
    assert key == json.loads((folders / "study" / "key.json").read_text())
    shown = [(Page(text).study["page"], pair) for text in pages(folders) for pair in Page(text).study["pairs"]]
    for (page, pair), of_key in zip(shown, key["pairs"], strict=True):
        assert (page, pair["id"], pair["caption"]) == (of_key["page"], of_key["id"], of_key["caption"])
        number = CAPTIONS.index(pair["caption"])
        sides = {"left": colour(pair["left"]), "right": colour(pair["right"])}
        assert sides.pop(of_key["a_is"]) == (200, number * 9, 77)
        assert list(sides.values()) == [(20, number * 9, 77)]


def test_order_and_sides_are_chance_by_the_seed(folders: Path) -> None:
    first, again, other = make(folders, "one"), make(folders, "two"), make(folders, "three", seed=1)
    assert first["pairs"] == again["pairs"] and first["study"] == again["study"]
    assert pages(folders, "one") == pages(folders, "two")
    assert other["study"] != first["study"]
    assert [pair["caption"] for pair in other["pairs"]] != [pair["caption"] for pair in first["pairs"]] != CAPTIONS
    sides = Counter(pair["a_is"] for seed in range(40) for pair in make(folders, f"s{seed}", seed=seed)["pairs"])
    assert binomtest(sides["left"], sides.total()).pvalue > 0.001


def test_a_page_runs_no_caption_and_needs_nothing(folders: Path) -> None:
    """Captions are data of the page, wherever a quote or a tag in them would end; and nothing is outside of it."""
    make(folders)
    expected = None
    for text in pages(folders):
        page = Page(text)
        assert page.elements["script"] == 2 and page.elements["img"] == 2
        assert page.links == []
        assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|innerHTML|WebSocket|sendBeacon", text)
        assert "default-src 'none'" in text
        assert "@CONTENT@" not in text and "p0.png" not in text and str(folders) not in text
        code = text[text.rindex("<script>") :]
        assert expected in (None, code)  # nothing of a study stands in the code
        expected = code
        assert {*page.study} == {"study", "page", "pairs"}
        assert all({*pair} == {"id", "caption", "left", "right"} for pair in page.study["pairs"])


def test_pictures_by_list_and_by_name(folders: Path) -> None:
    (folders / "a" / "pictures.json").unlink()
    by_name = images_by_caption(str(folders / "a"), CAPTIONS)
    assert [path.name for path in by_name.values()] == [f"p{number}.png" for number in range(12)]  # p2 before p10
    moved = json.loads((folders / "a.json").read_text())
    listed = folders / "a" / "list.json"
    listed.write_text(json.dumps([*moved, {"caption": CAPTIONS[1], "picture": "p7.png"}]))
    assert images_by_caption(str(listed), None) == by_name  # the first of a caption counts
    assert list(images_by_caption(str(listed), CAPTIONS[3:5])) == CAPTIONS[3:5]
    plain = [*CAPTIONS[1:]]
    (folders / "captions.txt").write_text("\n".join([*plain[:4], "", "a twelfth", *plain[4:]]) + "\n")
    key = make(folders, a=str(folders / "a"), captions=str(folders / "captions.txt"), b=str(folders / "a"))
    assert {pair["caption"] for pair in key["pairs"]} == {*plain, "a twelfth"}


def test_pictures_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Numbers as numbers, whatever else isdigit() takes for one."""
    names = ["2.png", "10.PNG", "a2.tif", "a10.png", "x²1.png", "²5.png"]
    for name in sorted(names):
        (tmp_path / name).touch()
    assert [path.name for path in images_by_caption(str(tmp_path), "abcdef").values()] == names


def test_names_are_no_markup(folders: Path) -> None:
    """Paths and voters are printed as they are, brackets included."""
    for model in ("a", "b"):
        (folders / f"[bold]{model}").mkdir()
        shutil.copytree(folders / model, folders / f"[bold]{model}" / "x]", dirs_exist_ok=True)
    key = make(folders, a=str(folders / "[bold]a" / "x]"), b=str(folders / "[bold]b" / "x]"))
    files = [file for voter in ("v1", "v2", "v3") for file in write_votes(folders, key, voter, lambda *_: "a")]
    files += write_votes(folders, key, "hasty", lambda *_: "b", seconds=1.0)
    for file in files[-key["pages"] :]:
        content = json.loads(Path(file).read_text())
        Path(file).write_text(json.dumps({**content, "voter": "[/no]"}))
    shown = io.StringIO()
    Console(file=shown, width=200).print(report(count(folders, files)))
    assert "[bold]a/x]" in shown.getvalue() and "voter [/no]: 100%" in shown.getvalue()


def test_mistakes_in_making_are_named(folders: Path) -> None:
    a, b = folders / "a", folders / "b"
    with pytest.raises(ConfigError, match="pairs_per_page must be at least 1"):
        make(folders, pairs_per_page=0)
    with pytest.raises(ConfigError, match="out must be a folder that does not exist yet"):
        make(folders, out="a")
    with pytest.raises(DataError, match="no images at"):
        make(folders, a=str(folders / "absent"))
    (b / "pictures.json").write_text(json.dumps([{"caption": "another", "picture": "p0.png"}]))
    with pytest.raises(DataError, match=r"have images of different captions: '.*' is in --"):
        make(folders)
    (b / "pictures.json").write_text(json.dumps([{"caption": "another", "picture": "../absent.png"}]))
    with pytest.raises(DataError, match=r"absent\.png, which is not there"):
        make(folders)
    for wrong in ("{", "[]", '["a"]', '[{"caption": 3, "picture": "p0.png"}]', HALF):
        (b / "pictures.json").write_text(wrong)
        with pytest.raises(DataError, match=r"pictures\.json"):
            make(folders)
    (b / "pictures.json").unlink()
    with pytest.raises(DataError, match="say with --captions"):
        make(folders)
    (folders / "twice.txt").write_text("one\none\n")
    with pytest.raises(DataError, match="'one' twice"):
        make(folders, captions=str(folders / "twice.txt"))
    (folders / "few.txt").write_text("\n".join(["caption number 1", "caption number 2"]))
    with pytest.raises(DataError, match="12 images for 2 captions"):
        make(folders, captions=str(folders / "few.txt"))
    (a / "p3.png").write_text("no image")
    shutil.copy(folders / "b.json", b / "pictures.json")
    with pytest.raises(DataError, match=r"a/p3\.png: image cannot be decoded"):
        make(folders)
    assert not (folders / "study").exists()
    assert not [path for path in folders.iterdir() if "partial" in path.name]


# --- counting


def write_votes(folders: Path, key: dict[str, Any], voter: str, choose: Any, seconds: float = 9.0) -> list[str]:
    """Files of one voter, one for each page; `choose(caption, question)` is "a", "b" or "tie"."""
    files = []
    for page in range(1, key["pages"] + 1):
        answers = []
        for pair in key["pairs"]:
            if pair["page"] == page:
                for question in ("realism", "caption"):
                    choice = choose(pair["caption"], question)
                    sides = {"a": pair["a_is"], "b": "left" if pair["a_is"] == "right" else "right", "tie": "tie"}
                    answers.append(
                        {"pair": pair["id"], "question": question, "answer": sides[choice], "seconds": seconds}
                    )
        content = {"kind": "votes of a study", "study": key["study"], "page": page, "voter": voter, "answers": answers}
        path = folders / f"{voter}-{page}.json"
        path.write_text(json.dumps(content))
        files.append(str(path))
    return files


def count(folders: Path, files: list[str], **changes: Any) -> Any:
    return count_study(CountOptions(votes=tuple(files), study=str(folders / "study"), **changes))


def test_votes_are_counted_by_majority(folders: Path) -> None:
    """Random votes of five, against a count by hand that knows nothing of sides."""
    key, chance = make(folders), random.Random(0)
    cast: dict[tuple[str, str], list[str]] = {}

    def choose(caption: str, question: str) -> str:
        choice = chance.choice("aaabbt").replace("t", "tie")
        cast.setdefault((caption, question), []).append(choice)
        return choice

    files = [file for voter in range(5) for file in write_votes(folders, key, f"voter{voter}", choose)]
    found = count(folders, files, json=str(folders / "count.json"))
    for question, tally in found["questions"].items():
        ballots = [Counter(votes) for (_, asked), votes in cast.items() if asked == question]
        a = sum(votes["a"] > max(votes["b"], votes["tie"]) for votes in ballots)
        b = sum(votes["b"] > max(votes["a"], votes["tie"]) for votes in ballots)
        assert (tally["a"], tally["b"], tally["tie"], tally["pairs_with_fewer_than_5_voters"]) == (a, b, 12 - a - b, 0)
        assert Counter(tally["votes"]) == sum(ballots, Counter())
        assert tally["share_a"] == pytest.approx((a + (12 - a - b) / 2) / 12)
    written = json.loads((folders / "count.json").read_text())
    assert written["questions"]["realism"]["share_a"] == found["questions"]["realism"]["share_a"]
    assert {voter["name"] for voter in written["voters"]} == {f"voter{voter}" for voter in range(5)}
    fewer = count(folders, files[:8])  # two voters of all pages and one of two
    assert fewer["questions"]["caption"]["pairs_with_fewer_than_5_voters"] == 12
    assert fewer["questions"]["caption"]["pairs"] == 12
    assert count(folders, files[:1])["questions"]["realism"]["pairs"] == 5


def test_majorities() -> None:
    for votes, expected in (
        ({"a": 3, "b": 2}, "a"),
        ({"b": 5}, "b"),
        ({"a": 2, "b": 1, "tie": 2}, "tie"),
        ({"a": 2, "b": 2, "tie": 1}, "tie"),
        ({"a": 2, "b": 1, "tie": 1}, "a"),
        ({"tie": 4, "a": 1}, "tie"),
        ({}, "tie"),
    ):
        assert majority(Counter(votes)) == expected


def test_intervals_are_those_of_unclip_and_scipy() -> None:
    for share, half in (
        (0.471, 3.1),
        (0.411, 3.0),
        (0.626, 3.0),
        (0.489, 3.1),
        (0.453, 3.1),
        (0.705, 2.8),
        (0.57, 3.1),
    ):
        # Table 1 and §5.1, n = 1000. Of 45.3 % the table says 3.0, where its own formula gives 3.08.
        assert 100 * normal_half_width(share, 1000) == pytest.approx(half, abs=0.051)
    for wins, pairs in ((0, 7), (3, 7), (7, 7), (933, 1000), (1, 2)):
        expected = binomtest(wins, pairs).proportion_ci(method="wilson")
        assert wilson_interval(wins / pairs, pairs) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_voters_who_did_not_look_are_flagged(folders: Path) -> None:
    """Both signs are needed: haste alone, or another opinion alone, is none."""
    key = make(folders)
    files = [file for voter in ("v1", "v2", "v3") for file in write_votes(folders, key, voter, lambda *_: "a")]
    files += write_votes(folders, key, "quick", lambda *_: "a", seconds=1.5)
    files += write_votes(folders, key, "contrary", lambda *_: "b")
    files += write_votes(folders, key, "careless", lambda *_: "b", seconds=3.9)
    found = count(folders, files)
    assert [voter["name"] for voter in found["voters"] if voter["flagged"]] == ["careless"]
    assert found["questions"]["realism"]["votes"] == {"a": 48, "b": 24, "tie": 0}
    dropped = count(folders, files, drop_flagged=True)
    assert dropped["questions"]["realism"]["votes"] == {"a": 48, "b": 12, "tie": 0}
    assert next(voter for voter in found["voters"] if voter["name"] == "quick")["hasty"] == 1
    assert next(voter for voter in found["voters"] if voter["name"] == "contrary")["dissent"] == 1


def test_voters_are_held_against_the_others_alone(folders: Path) -> None:
    """Their own votes make no majority of the others; and where the others have none, nobody is against it."""
    key = make(folders)
    files = [*write_votes(folders, key, "v1", lambda *_: "a"), *write_votes(folders, key, "v2", lambda *_: "b")]
    assert [voter["dissent"] for voter in count(folders, files)["voters"]] == [1, 1]
    files += write_votes(folders, key, "v3", lambda *_: "tie")
    assert [voter["dissent"] for voter in count(folders, files)["voters"]] == [0, 0, 0]


def test_the_same_votes_count_once(folders: Path) -> None:
    """A voter who saved twice, the first time halfway, is one voter."""
    key = make(folders)
    files = write_votes(folders, key, "v1", lambda *_: "a")
    content = json.loads(Path(files[0]).read_text())
    half = folders / "half.json"
    half.write_text(json.dumps({**content, "answers": content["answers"][:4]}))
    assert count(folders, [str(half), *files])["questions"]["realism"]["votes"] == {"a": 12, "b": 0, "tie": 0}
    changed = [{**content["answers"][0], "answer": "tie"}]
    half.write_text(json.dumps({**content, "answers": changed}))
    with pytest.raises(DataError, match="otherwise than another file of the same voter"):
        count(folders, [str(half), *files])


def test_votes_of_another_study_or_changed_are_refused(folders: Path) -> None:
    key = make(folders)
    file = Path(write_votes(folders, key, "v1", lambda *_: "a")[0])
    other = make(folders, "other", seed=9)
    foreign = write_votes(folders, other, "v2", lambda *_: "a")[0]
    with pytest.raises(ConfigError, match=f"votes of another study .*{other['study']}.* this one is {key['study']}"):
        count(folders, [str(file), foreign])
    content = json.loads(file.read_text())
    first = content["answers"][0]
    for change in (
        {"pair": "99999"}, {"pair": key["pairs"][-1]["id"]}, {"pair": None}, {"question": "beauty"}, {"answer": "a"},
        {"seconds": -1}, {"seconds": float("nan")}, {"seconds": True}, {"seconds": "4"}, {"seconds": 10**400},
        {"answer": ["left"]}, {"question": ["realism"]},
    ):  # fmt: skip
        file.write_text(json.dumps({**content, "answers": [{**first, **change}]}))
        with pytest.raises(DataError, match="was changed"):
            count(folders, [str(file)])
    damaged = [{**content, **change} for change in ({"voter": None}, {"voter": "\ud83d"}, {"answers": {}})]
    for text in ("{", "[]", *map(json.dumps, damaged)):
        file.write_text(text)
        with pytest.raises(DataError, match=r"v1-1\.json"):
            count(folders, [str(file)])
    with pytest.raises(DataError, match="no study at"):
        count_study(CountOptions(votes=(str(file),), study=str(folders / "nowhere")))
    turned = [{**pair, "a_is": "Left"} for pair in key["pairs"]]  # all of whose votes would be for B
    for damage in (
        {"pairs": 3}, {"pairs": [{"id": "00000"}]}, {"pairs": turned}, {"seed": 7}, {"study": None}, {"kind": None},
        {"a": "\ud83d"}, {"b": None},
    ):  # fmt: skip
        (folders / "broken.json").write_text(json.dumps({**key, **damage}))
        with pytest.raises(DataError, match=r"broken\.json is"):
            count_study(CountOptions(votes=(str(file),), study=str(folders / "broken.json")))
    with pytest.raises(ConfigError, match="no votes"):
        count(folders, [])


def test_the_launcher(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
        try:
            runpy.run_path(str(ROOT / "launchers" / "study.py"), run_name="__main__")
        except SystemExit as stop:
            captured = capsys.readouterr()
            return int(stop.code or 0), captured.out + captured.err
        return 0, capsys.readouterr().out

    study = str(folders / "study")
    status, said = call("make", "--a", str(folders / "a.json"), "--b", str(folders / "b"), "--out", study)
    assert status == 1 and "p0.png, which is not there" in said  # names in a list are beside it
    status, said = call("make", "--a", str(folders / "a"), "--b", str(folders / "b"), "--out", study)
    assert status == 0 and "12 pairs" in said
    key = json.loads((folders / "study" / "key.json").read_text())
    files = [file for voter in range(5) for file in write_votes(folders, key, f"v{voter}", lambda *_: "b", seconds=2.0)]
    status, said = call("count", *files, "--study", study, "--json", str(folders / "count.json"))
    assert status == 0 and "matches the caption" in said and "0.0% ± 0.0%" in said
    assert json.loads((folders / "count.json").read_text())["questions"]["caption"]["wilson_95"][1] > 0.2


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVE = """<script>
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {key}));
const told = {place: state.answers.length, started: !at("start").hidden};
document.title = "untouched";
press("1");
told.before = state.answers.length;
at("begin").click();
if (told.place === 0) {
  told.caption_hidden = at("caption").textContent;
  document.querySelector("[data-answer=right]").click();
  told.caption = at("caption").textContent;
  press("3"); press("2"); at("back").click(); press("1");
} else {
  for (let n = 0; n < 100; n++) press("2");
}
told.ended = !at("end").hidden;
let blob;
URL.createObjectURL = (made) => { blob = made; return "#"; };
at("save").click();
told.injected = document.querySelectorAll("body img").length !== 2;
told.title = document.title;
blob.text().then((text) => {
  const out = document.createElement("pre");
  out.id = "told";
  out.textContent = JSON.stringify({...told, votes: JSON.parse(text)});
  document.body.append(out);
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_a_browser_keeps_the_place_and_saves_the_votes(folders: Path) -> None:
    """From a file, without a network: some answers, the page closed and opened again, the rest of them, and the count."""
    key = make(folders, pairs_per_page=12)
    number = next(number for number, pair in enumerate(key["pairs"]) if pair["caption"] == EVIL)
    key["pairs"].insert(0, key["pairs"].pop(number))
    (page,) = (folders / "study" / "pages").iterdir()
    page.write_text(page.read_text().replace("</body>", DRIVE))

    def visit() -> dict[str, Any]:
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={folders / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120, env={**os.environ, "HOME": str(folders)})
        found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout.decode(), re.DOTALL)
        assert found, done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:]
        return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))

    first, second = visit(), visit()
    shown = Page(page.read_text()).study["pairs"]
    assert (first["place"], first["before"], first["ended"], first["started"]) == (0, 0, False, True)
    assert first["caption_hidden"] == "" and first["caption"] == f"“{shown[0]['caption']}”"
    answers = first["votes"]["answers"]
    asked = [(answer["pair"], answer["question"], answer["answer"]) for answer in answers]
    ids = [pair["id"] for pair in shown]
    assert asked == [(ids[0], "realism", "right"), (ids[0], "caption", "tie"), (ids[1], "realism", "left")]
    assert all(0 <= answer["seconds"] < 60 for answer in answers)
    assert (second["place"], second["before"], second["ended"]) == (3, 3, True)
    assert second["votes"]["voter"] == first["votes"]["voter"]
    assert second["votes"]["answers"][:3] == answers and len(second["votes"]["answers"]) == 24
    for told in (first, second):
        assert told["title"] == "untouched" and not told["injected"]
    file = folders / "votes.json"
    file.write_text(json.dumps(second["votes"]))
    tallies = count(folders, [str(file)])["questions"]
    assert sum(tallies["realism"]["votes"].values()) == sum(tallies["caption"]["votes"].values()) == 12
    assert tallies["caption"]["votes"]["tie"] == 1


def test_pages_hold_every_pixel(folders: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folders / "a" / "p5.png")
    key = make(folders, pairs_per_page=20)
    pair = next(pair for pair in key["pairs"] if pair["caption"] == CAPTIONS[5])
    shown = next(shown for shown in Page(pages(folders)[0]).study["pairs"] if shown["id"] == pair["id"])
    data = base64.b64decode(shown[pair["a_is"]].removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), noise)
