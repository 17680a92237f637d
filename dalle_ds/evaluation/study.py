"""Studies of human preference between two models' images (DALL·E §3.1, App. F; unCLIP §5.2, App. B): pages, and their votes.

Voters see one image of each model for a caption, and answer two questions: which is more realistic ("not sure" is an
answer), and, the caption only then shown, which matches it better ("neither"). Order and sides are random, and written down
in `key.json`, which voters do not get; what they get is pages of one file each, which work without a network. `count_study`
counts the files that the pages save: majorities, shares with intervals, and voters who did not look.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from PIL import Image
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dalle_ds.data.corpora.files import is_read
from dalle_ds.data.images import decode_image
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.pages import data_uri, encoded, write_template
from dalle_ds.files import built_beside, write_json
from dalle_ds.parsing import is_text, parse_json, shown
from dalle_ds.sampling.command import LIST_NAME, read_prompts

KEY_NAME = "key.json"
KIND, VOTES_KIND = "key of a study", "votes of a study"
QUESTIONS = {"realism": "more realistic", "caption": "matches the caption"}
Choice = Literal["a", "b", "tie"]
CHOICES: tuple[Choice, ...] = ("a", "b", "tie")
VOTERS = 5
"""Distinct voters that each pair should have (DALL·E App. F)."""
FAST_SECONDS = 4.0
"""Answers that take less are hasty (DALL·E App. F)."""
HASTY_SHARE = DISSENT_SHARE = 0.5
"""Voters with these shares of hasty answers, and of answers against the majority of the others, or more, did not look."""
Z = 1.959964
"""Of 95 % intervals."""


@dataclass(frozen=True)
class MakeOptions:
    """Make the pages of a study from two models' images."""

    a: str
    """Images of model A: a folder that launchers/generate.py made, its pictures.json, or any folder with one image for
    each caption, in the order of their names."""
    b: str
    """Images of model B, likewise."""
    out: str
    """Folder to make: pages/ for the voters, and key.json, which is not for them."""
    captions: str | None = None
    """Text file, one caption on a line; for folders without pictures.json."""
    seed: int = 0
    """Of the order of pairs and of their sides."""
    pairs_per_page: int = 50
    """Pairs in one page, the share of one voter; each page is for 5 voters."""


@dataclass(frozen=True)
class CountOptions:
    """Count the votes of a study."""

    votes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files that the pages saved."""
    study: str
    """Folder of the study, or its key.json."""
    drop_flagged: bool = False
    """Leave out voters who were hasty and contradicted the others."""
    json: str | None = None
    """File for all figures."""


# --- pages --------------------------------------------------------------------------------------------------------------


def make_study(options: MakeOptions) -> dict[str, Any]:
    """Write the pages and the key; returns the key.

    Raises:
        ConfigError: an option out of range; an output folder that exists.
        DataError: images or captions that cannot be read, or do not belong together.
    """
    out = Path(options.out)
    if out.exists():
        raise ConfigError(f"out must be a folder that does not exist yet, found {out}: votes belong to one study")
    if options.pairs_per_page < 1:
        raise ConfigError(f"pairs_per_page must be at least 1, found {options.pairs_per_page}")
    captions = None if options.captions is None else read_prompts(options.captions)
    of_a, of_b = images_by_caption(options.a, captions), images_by_caption(options.b, captions)
    if of_a.keys() != of_b.keys():
        caption = min(of_a.keys() ^ of_b.keys())
        which = "a" if caption in of_a else "b"
        raise DataError(
            f"--a {options.a} and --b {options.b} have images of different captions: {caption!r} is in --{which} only"
        )
    key = _key(of_a, of_b, options)
    with built_beside(out) as partial:
        (partial / "pages").mkdir()
        for page in range(1, key["pages"] + 1):
            pairs = [_shown_pair(pair, of_a, of_b) for pair in key["pairs"] if pair["page"] == page]
            content = {"study": key["study"], "page": page, "pairs": pairs}
            write_template(partial / "pages" / f"page-{page:02}.html", "study.html", content)
        write_json(partial / KEY_NAME, key)
    return key


def _key(of_a: Mapping[str, Path], of_b: Mapping[str, Path], options: MakeOptions) -> dict[str, Any]:
    """What is shown where: a function of captions, images and seed."""
    chance = random.Random(options.seed)
    order = list(of_a)
    chance.shuffle(order)
    pairs = [
        {
            "id": f"{number:05}",
            "page": number // options.pairs_per_page + 1,
            "caption": caption,
            "a_is": chance.choice(("left", "right")),
            "a": hashlib.sha256(of_a[caption].read_bytes()).hexdigest(),
            "b": hashlib.sha256(of_b[caption].read_bytes()).hexdigest(),
        }
        for number, caption in enumerate(order)
    ]
    content: dict[str, Any] = {"a": options.a, "b": options.b, "seed": options.seed, "pairs": pairs}
    return {"kind": KIND, "study": study_name(content), "pages": pairs[-1]["page"], **content}


def study_name(key: Mapping[str, Any]) -> str:
    """A fingerprint of what is shown where, by which votes know their study, and a key whether it is damaged."""
    content = json.dumps([key.get("seed"), key.get("pairs")], sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _shown_pair(pair: Mapping[str, Any], of_a: Mapping[str, Path], of_b: Mapping[str, Path]) -> dict[str, str]:
    """What a page has of a pair: nothing that tells one model from the other but the images themselves."""
    found = []
    for path in (of_a[pair["caption"]], of_b[pair["caption"]]):
        try:  # the pixels, and nothing else of the file
            found.append(data_uri(encoded(Image.fromarray(decode_image(path.read_bytes())))))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    left, right = found if pair["a_is"] == "left" else reversed(found)
    return {"id": pair["id"], "caption": pair["caption"], "left": left, "right": right}


def images_by_caption(source: str, captions: Sequence[str] | None) -> dict[str, Path]:
    """Caption → image.

    Args:
        source: a `pictures.json`, a folder with one, or a folder of images, which `captions` then belong to in the order of
            their names, numbers in them counted as such.

    Raises:
        DataError: no such images, or not one for each caption.
    """
    path = Path(source)
    listed = path / LIST_NAME if path.is_dir() else path
    if listed.is_file():
        found = _listed(listed)
        if missing := [caption for caption in captions or () if caption not in found]:
            raise DataError(f"{listed} has no image of the caption {missing[0]!r}")
        return found if captions is None else {caption: found[caption] for caption in captions}
    if not path.is_dir():
        raise DataError(f"no images at {source}: name a folder, or a {LIST_NAME}")
    if captions is None:
        raise DataError(f"{source} has no {LIST_NAME}: say with --captions what its images were generated for")
    files = sorted((file for file in path.iterdir() if is_read(file.name)), key=_natural)
    if len(files) != len(captions):
        raise DataError(f"{source} has {len(files)} images for {len(captions)} captions: it needs one for each")
    return dict(zip(captions, files, strict=True))


def _listed(path: Path) -> dict[str, Path]:
    try:
        entries = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found: dict[str, Path] = {}
    for entry in entries if isinstance(entries, list) and entries else [entries]:
        if not (isinstance(entry, dict) and all(is_text(entry.get(name)) for name in ("caption", "picture"))):
            raise DataError(f'{path} must hold a list of {{"caption", "picture"}}, found {shown(entry)}')
        # The first of a caption is the best of its candidates.
        found.setdefault(entry["caption"], path.parent / entry["picture"])
    for image in found.values():
        if not image.is_file():
            raise DataError(f"{path} names {image}, which is not there")
    return found


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts image-2 before image-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


# --- votes --------------------------------------------------------------------------------------------------------------


class Vote(NamedTuple):
    """One answer."""

    pair: str
    question: str
    voter: str
    choice: Choice
    seconds: float


def count_study(options: CountOptions) -> dict[str, Any]:
    """Count, and write the figures where they are wanted.

    Returns:
        The models' names, "questions" (`tally`), "voters" (`judge_voters`), and whether flagged voters were left out.

    Raises:
        ConfigError: votes of another study; a file for the figures that cannot be written.
        DataError: a file that cannot be read, or was changed.
    """
    if options.json is not None and (Path(options.json).is_dir() or not Path(options.json).parent.is_dir()):
        raise ConfigError(f"--json must be a file in a folder that exists, found {options.json}")
    if not options.votes:
        raise ConfigError("no votes were given: name the files that the pages saved")
    key = read_key(options.study)
    votes = read_votes(options.votes, key)
    voters = judge_voters(votes)
    out = {voter["name"] for voter in voters if voter["flagged"] and options.drop_flagged}
    counted = [vote for vote in votes if vote.voter not in out]
    count = {
        "a": key["a"],
        "b": key["b"],
        "questions": {question: tally(counted, question, len(key["pairs"])) for question in QUESTIONS},
        "voters": voters,
        "flagged_voters_left_out": options.drop_flagged,
    }
    if options.json is not None:
        write_json(Path(options.json), count)
    return count


def report(count: dict[str, Any]) -> RenderableType:
    """What `count_study` found, as a table for a console and notes."""
    # Texts, so that brackets in names are no markup.
    table = Table(title=Text(f"A: {count['a']}\nB: {count['b']}"), title_justify="left")
    table.add_column("majority of voters")
    for heading in ("pairs", "A", "B", "tie", "share of A ± 95 %", "Wilson 95 %"):
        table.add_column(heading, justify="right")
    notes = []
    for name, found in count["questions"].items():
        if missing := found["pairs_with_fewer_than_5_voters"]:
            notes.append(f"{name}: {missing} pairs have fewer than {VOTERS} voters")
        if found["pairs"]:
            low, high = found["wilson_95"]
            counts = (str(found[column]) for column in ("pairs", "a", "b", "tie"))
            share = f"{found['share_a']:.1%} ± {found['half_width_95']:.1%}"
            table.add_row(QUESTIONS[name], *counts, share, f"{low:.1%} – {high:.1%}")
    what = "left out" if count["flagged_voters_left_out"] else "counted: leave out with --drop_flagged True"
    notes += [
        f"voter {voter['name'][:8]}: {voter['hasty']:.0%} of {voter['answers']} answers under {FAST_SECONDS} s, "
        f"{voter['dissent']:.0%} are against the other voters' majority ({what})"
        for voter in count["voters"]
        if voter["flagged"]
    ]
    return Group(table, *map(Text, notes))


def read_key(path: str | Path) -> dict[str, Any]:
    """The key of a study, by its folder or file.

    Raises:
        DataError: there is none.
    """
    file = Path(path) / KEY_NAME if Path(path).is_dir() else Path(path)
    try:
        key = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"no study at {path}: {file} cannot be read ({error})") from error
    if not isinstance(key, dict) or key.get("kind") != KIND:
        raise DataError(f"{file} is not the key of a study: name the folder that `study.py make` made")
    if not (is_text(key.get("a")) and is_text(key.get("b"))) or key.get("study") != study_name(key):
        raise DataError(f"{file} is damaged: make the study again, of the same images and with the same seed")
    return key


def read_votes(paths: Sequence[str | Path], key: dict[str, Any]) -> list[Vote]:
    """The answers in all files, sides turned into models. Of a voter's files of one page, what is there twice counts once.

    Raises:
        ConfigError: a file of another study.
        DataError: a file that is none of votes, or damaged; a voter who answered a question twice, and differently.
    """
    try:
        pairs = {pair["id"]: pair for pair in key["pairs"]}
    except (KeyError, TypeError) as error:
        raise DataError("the key of the study has no pairs: make the study again") from error
    votes: dict[tuple[str, str, str], Vote] = {}
    for path in paths:
        try:
            content = parse_json(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"the votes in {path} cannot be read: {error}") from error
        fine = isinstance(content, dict) and content.get("kind") == VOTES_KIND
        if not fine or not is_text(content.get("voter")) or not isinstance(content.get("answers"), list):
            raise DataError(f"{path} holds no votes: name the files that the pages of a study saved")
        if content.get("study") != key["study"]:
            raise ConfigError(
                f"{path} has votes of another study ({shown(content.get('study'))}, this one is {key['study']}): leave it out"
            )
        for answer in content["answers"]:
            vote = _vote(answer, content, pairs)
            if vote is None:
                raise DataError(f"{path} was changed: {shown(answer)} is no answer that its page gives; leave it out")
            if votes.setdefault((vote.voter, vote.pair, vote.question), vote) != vote:
                raise DataError(
                    f"{path} answers pair {vote.pair} ({vote.question}) otherwise than another file of the same voter: keep "
                    "the one that was saved last"
                )
    return list(votes.values())


def _vote(answer: Any, content: dict[str, Any], pairs: dict[str, dict[str, Any]]) -> Vote | None:
    """An answer of a page; None where it is none."""
    try:
        pair, question, side, seconds = pairs[answer["pair"]], answer["question"], answer["answer"], answer["seconds"]
        known = question in QUESTIONS and side in ("left", "right", "tie") and pair["page"] == content.get("page")
    except (KeyError, TypeError):  # something is missing, or not even a name
        return None
    if not known or type(seconds) not in (int, float) or not 0 <= seconds < 1e9:
        return None
    choice: Choice = "tie" if side == "tie" else "a" if side == pair["a_is"] else "b"
    return Vote(pair["id"], question, content["voter"], choice, float(seconds))


def majority(votes: Mapping[Choice, int]) -> Choice:
    """The answer with more votes than any other; a tie where there is none."""
    most = max(votes.values(), default=0)
    best = [choice for choice, count in votes.items() if count == most]
    return best[0] if len(best) == 1 else "tie"


def tally(votes: Sequence[Vote], question: str, pairs: int) -> dict[str, Any]:
    """What came of one question, in a study of so many pairs.

    Returns:
        a, b, tie: pairs whose majority prefers model A, B, neither.
        votes: all of them, by choice.
        pairs: those with votes.
        pairs_with_fewer_than_5_voters: those without any included.
        share_a, share_b: of pairs, ties as half (GLIDE App. A.1), with `half_width_95` and `wilson_95` of the former; where
            there are votes.
    """
    of_pairs: dict[str, Counter[Choice]] = defaultdict(Counter)
    for vote in votes:
        if vote.question == question:
            of_pairs[vote.pair][vote.choice] += 1
    won, every = Counter(map(majority, of_pairs.values())), sum(of_pairs.values(), Counter())
    voted = len(of_pairs)
    found: dict[str, Any] = {
        **{choice: won[choice] for choice in CHOICES},
        "votes": {choice: every[choice] for choice in CHOICES},
        "pairs": voted,
        "pairs_with_fewer_than_5_voters": pairs - sum(each.total() >= VOTERS for each in of_pairs.values()),
    }
    if voted:
        share = (won["a"] + won["tie"] / 2) / voted
        found |= {"share_a": share, "share_b": 1 - share, "half_width_95": normal_half_width(share, voted)}
        found["wilson_95"] = list(wilson_interval(share, voted))
    return found


def judge_voters(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """How each voter voted.

    Returns:
        name, and how many "answers".
        hasty: share of them that took less than 4 s.
        dissent: share of them against the majority of the other voters, where these have one.
        flagged: whether the voter seems not to have looked.
    """
    of_questions: dict[tuple[str, str], Counter[Choice]] = defaultdict(Counter)
    of_voters: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        of_questions[vote.pair, vote.question][vote.choice] += 1
        of_voters[vote.voter].append(vote)
    voters = []
    for name, own in of_voters.items():
        against = []
        for vote in own:
            expected = majority(of_questions[vote.pair, vote.question] - Counter([vote.choice]))
            if expected != "tie":
                against.append(vote.choice != expected)
        hasty = sum(vote.seconds < FAST_SECONDS for vote in own) / len(own)
        dissent = sum(against) / len(against) if against else 0.0
        flagged = hasty >= HASTY_SHARE and dissent >= DISSENT_SHARE
        voters.append({"name": name, "answers": len(own), "hasty": hasty, "dissent": dissent, "flagged": flagged})
    return voters


def normal_half_width(share: float, count: int) -> float:
    """Half of the 95 % interval of a share of `count`, by the normal approximation (unCLIP App. B)."""
    return Z * math.sqrt(share * (1 - share) / count)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count`, which holds near 0 and 1, too, where the normal one is too narrow."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
