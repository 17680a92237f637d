"""Counting the votes of a study: majorities, shares with intervals, and voters who did not look."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.study.pages import KEY_NAME, KIND, study_name
from dalle_ds.files import write_json
from dalle_ds.parsing import is_text, parse_json, shown

QUESTIONS = {"realism": "more realistic", "caption": "matches the caption"}
Choice = Literal["a", "b", "tie"]
VOTERS = 5
"""Distinct voters that each pair should have (DALL·E App. F)."""
FAST_SECONDS = 4.0
"""Answers that take less are hasty (DALL·E App. F)."""
HASTY_SHARE = 0.5
"""Voters with this share of hasty answers or more …"""
DISSENT_SHARE = 0.5
"""… who contradict the majority of the others this often or more, did not look."""
_LONGEST = 1e9
"""Seconds that no answer takes."""
Z = 1.959964
"""Of 95 % intervals."""


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


@dataclass(frozen=True)
class Vote:
    """One answer."""

    pair: str
    question: str
    voter: str
    choice: Choice
    seconds: float


@dataclass
class Voter:
    """How somebody voted."""

    name: str
    answers: int
    hasty: float
    """Share of answers that took less than 4 s."""
    dissent: float
    """Share of answers against the majority of the other voters, where they have one."""

    @property
    def flagged(self) -> bool:
        """Whether the voter seems not to have looked."""
        return self.hasty >= HASTY_SHARE and self.dissent >= DISSENT_SHARE


@dataclass
class Tally:
    """What came of one question."""

    a: int
    """Pairs whose majority prefers model A."""
    b: int
    tie: int
    """Pairs without a majority for either."""
    votes: dict[str, int]
    """All votes: "a", "b", "tie"."""
    incomplete: int
    """Pairs with fewer than 5 voters, those without any included."""

    @property
    def pairs(self) -> int:
        """Pairs with votes."""
        return self.a + self.b + self.tie

    @property
    def share_a(self) -> float:
        """Share of pairs for A, ties as half (GLIDE App. A.1)."""
        return (self.a + self.tie / 2) / self.pairs if self.pairs else math.nan

    def to_json(self) -> dict[str, Any]:
        """All figures; intervals are of `share_a`."""
        share, pairs = self.share_a, self.pairs
        figures: dict[str, Any] = {"a": self.a, "b": self.b, "tie": self.tie, "votes": self.votes}
        figures |= {"pairs": pairs, "pairs_with_fewer_than_5_voters": self.incomplete}
        if pairs:
            figures |= {"share_a": share, "share_b": 1 - share, "half_width_95": normal_half_width(share, pairs)}
            figures["wilson_95"] = list(wilson_interval(share, pairs))
        return figures


@dataclass
class Count:
    """A study's result."""

    a: str
    b: str
    tallies: dict[str, Tally] = field(default_factory=dict)
    voters: list[Voter] = field(default_factory=list)
    dropped: bool = False

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {
            "a": self.a,
            "b": self.b,
            "questions": {name: tally.to_json() for name, tally in self.tallies.items()},
            "voters": [{**vars(voter), "flagged": voter.flagged} for voter in self.voters],
            "flagged_voters_left_out": self.dropped,
        }

    def report(self) -> RenderableType:
        """Tables for a console."""
        # Texts, so that brackets in names are no markup.
        table = Table(title=Text(f"A: {self.a}\nB: {self.b}"), title_justify="left")
        for heading in ("majority of voters", "pairs", "A", "B", "tie", "share of A ± 95 %", "Wilson 95 %"):
            table.add_column(heading, justify="left" if heading == "majority of voters" else "right")
        notes = []
        for name, tally in self.tallies.items():
            if tally.incomplete:
                notes.append(f"{name}: {tally.incomplete} pairs have fewer than {VOTERS} voters")
            if not tally.pairs:
                continue
            half, (low, high) = (
                normal_half_width(tally.share_a, tally.pairs),
                wilson_interval(tally.share_a, tally.pairs),
            )
            counts = (str(count) for count in (tally.pairs, tally.a, tally.b, tally.tie))
            share = f"{tally.share_a:.1%} ± {half:.1%}"
            table.add_row(QUESTIONS[name], *counts, share, f"{low:.1%} – {high:.1%}")
        for voter in self.voters:
            if voter.flagged:
                what = "left out" if self.dropped else "counted: leave out with --drop_flagged True"
                notes.append(
                    f"voter {voter.name[:8]}: {voter.hasty:.0%} of {voter.answers} answers under {FAST_SECONDS} s, "
                    f"{voter.dissent:.0%} are against the other voters' majority ({what})"
                )
        return Group(table, *map(Text, notes))


def count_study(options: CountOptions) -> Count:
    """Count, and write the figures where they are wanted.

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
    count = Count(key["a"], key["b"], voters=judge_voters(votes), dropped=options.drop_flagged)
    out = {voter.name for voter in count.voters if voter.flagged and options.drop_flagged}
    counted = [vote for vote in votes if vote.voter not in out]
    count.tallies = {question: tally(counted, question, len(key["pairs"])) for question in QUESTIONS}
    if options.json is not None:
        write_json(Path(options.json), count.to_json())
    return count


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
    pairs = key.get("pairs")
    whole = isinstance(pairs, list) and all(isinstance(pair, dict) and _has(pair, _OF_PAIR) for pair in pairs)
    if not whole or not (is_text(key.get("a")) and is_text(key.get("b"))) or key.get("study") != study_name(key):
        raise DataError(f"{file} is damaged: make the study again, of the same pictures and with the same seed")
    return key


def read_votes(paths: Sequence[str | Path], key: dict[str, Any]) -> list[Vote]:
    """The answers in all files, sides turned into models. Of a voter's files of one page, what is there twice counts once.

    Raises:
        ConfigError: a file of another study.
        DataError: a file that is none of votes, or damaged; a voter who answered a question twice, and differently.
    """
    pairs = {pair["id"]: pair for pair in key["pairs"]}
    votes: dict[tuple[str, str, str], Vote] = {}
    for path in paths:
        content = _content(Path(path))
        if content["study"] != key["study"]:
            raise ConfigError(
                f"{path} has votes of another study ({shown(content['study'])}, this one is {key['study']}): leave it out"
            )
        for answer in content["answers"]:
            vote = _vote(answer, content, pairs)
            if vote is None:
                raise DataError(f"{path} was changed: {shown(answer)} is no answer that its page gives; leave it out")
            place = vote.voter, vote.pair, vote.question
            if votes.setdefault(place, vote) != vote:
                raise DataError(
                    f"{path} answers pair {vote.pair} ({vote.question}) otherwise than another file of the same voter: keep "
                    "the one that was saved last"
                )
    return list(votes.values())


_OF_PAIR: dict[str, type] = {"id": str, "page": int, "a_is": str}


def _has(content: Mapping[str, Any], fields: Mapping[str, type]) -> bool:
    return all(isinstance(content.get(name), kind) for name, kind in fields.items())


def _content(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"the votes in {path} cannot be read: {error}") from error
    fine = isinstance(content, dict) and content.get("kind") == "votes of a study"
    if not fine or not is_text(content.get("voter")) or not isinstance(content.get("answers"), list):
        raise DataError(f"{path} holds no votes: name the files that the pages of a study saved")
    return {"study": None, "page": None, **content}


def _vote(answer: Any, content: dict[str, Any], pairs: dict[str, dict[str, Any]]) -> Vote | None:
    """An answer of a page; None where it is none."""
    if not isinstance(answer, dict) or not isinstance(answer.get("pair"), str):
        return None
    pair, side, seconds = pairs.get(answer["pair"]), answer.get("answer"), answer.get("seconds")
    if pair is None or pair["page"] != content["page"] or answer.get("question") not in tuple(QUESTIONS):
        return None
    if side not in ("left", "right", "tie") or isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return None
    if not 0 <= seconds < _LONGEST:
        return None
    choice: Choice = "tie" if side == "tie" else "a" if side == pair["a_is"] else "b"
    return Vote(pair["id"], answer["question"], content["voter"], choice, float(seconds))


def majority(votes: Mapping[Choice, int]) -> Choice:
    """The answer with more votes than any other; a tie where there is none."""
    most = max(votes.values(), default=0)
    best = [choice for choice, count in votes.items() if count == most]
    return best[0] if len(best) == 1 else "tie"


def tally(votes: Sequence[Vote], question: str, pairs: int) -> Tally:
    """Majorities of one question; `pairs` is how many the study has."""
    of_pairs: dict[str, Counter[Choice]] = defaultdict(Counter)
    for vote in votes:
        if vote.question == question:
            of_pairs[vote.pair][vote.choice] += 1
    won = Counter(majority(of_pair) for of_pair in of_pairs.values())
    every = sum(of_pairs.values(), Counter())
    complete = sum(of_pair.total() >= VOTERS for of_pair in of_pairs.values())
    by_choice = {choice: every[choice] for choice in get_args(Choice)}
    return Tally(won["a"], won["b"], won["tie"], by_choice, pairs - complete)


def judge_voters(votes: Sequence[Vote]) -> list[Voter]:
    """How hasty each voter was, and how often against the majority of the others."""
    of_questions: dict[tuple[str, str], list[Vote]] = defaultdict(list)
    of_voters: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        of_questions[vote.pair, vote.question].append(vote)
        of_voters[vote.voter].append(vote)
    voters = []
    for name, own in of_voters.items():
        against = decided = 0
        for vote in own:
            others = Counter(other.choice for other in of_questions[vote.pair, vote.question] if other.voter != name)
            expected = majority(others)
            if expected != "tie":
                decided += 1
                against += vote.choice != expected
        hasty = sum(vote.seconds < FAST_SECONDS for vote in own) / len(own)
        voters.append(Voter(name, len(own), hasty, against / decided if decided else 0.0))
    return voters


def normal_half_width(share: float, count: int) -> float:
    """Half of the 95 % interval of a share of `count`, by the normal approximation (unCLIP App. B)."""
    return Z * math.sqrt(share * (1 - share) / count)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count`, which holds near 0 and 1, too, where the normal one is too narrow."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
