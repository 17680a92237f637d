"""What a preparation did: counted by split and by reason, shown as a table, kept in `info.json`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

_EXAMPLES = 5
_SHOWN = 100  # characters of a caption


@dataclass
class Dropped:
    """Pairs left out for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """Names of the first five."""


@dataclass
class PreparationReport:
    """Counts of one preparation."""

    out: str
    """The prepared folder."""
    kept: dict[str, int] = field(default_factory=dict)
    """Split → pairs."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """Reason → pairs dropped."""
    unpaired: dict[str, Dropped] = field(default_factory=dict)
    """Reason → files, members of archives and rows of tables that belong to no pair."""
    captions_cut: int = 0
    """Captions of kept pairs that were shortened to the longest allowed."""
    captions_dropped: dict[str, int] = field(default_factory=dict)
    """Reason → captions dropped from pairs that were kept for their other captions."""
    caption_examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason → the first five captions dropped for it, of kept pairs or not."""
    fingerprint: str = ""
    """SHA-256 of all kept rows; what caches and runs are checked against."""
    notes: list[str] = field(default_factory=list)
    """What the reader should know besides: attribution, an empty split."""
    already_there: bool = False
    """The folder held this very preparation, and was left as it is."""

    def drop(self, reason: str, name: str, count: int = 1, *, unpaired: bool = False) -> None:
        """Count a pair, or several that are told of as one, or what belongs to none."""
        entry = (self.unpaired if unpaired else self.dropped).setdefault(reason, Dropped())
        entry.count += count
        if len(entry.examples) < _EXAMPLES:
            entry.examples.append(name)

    def drop_caption(self, reason: str, text: str) -> None:
        """Remember one caption; it is counted with its pair."""
        examples = self.caption_examples.setdefault(reason, [])
        if text and len(examples) < _EXAMPLES:
            examples.append(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")

    @property
    def read(self) -> int:
        """Pairs found in the corpus, kept or not."""
        return sum(self.kept.values()) + sum(entry.count for entry in self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        """The part that `info.json` keeps."""
        kept = dataclasses.asdict(self)
        del kept["out"], kept["already_there"]
        return {"splits": kept.pop("kept"), **kept}

    @classmethod
    def from_json(cls, out: str, info: dict[str, Any]) -> PreparationReport:
        """The inverse of `to_json`, for a folder that was there already; former versions wrote less."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        found = {name: value for name, value in info.items() if name in names}
        for name in ("dropped", "unpaired"):
            found[name] = {reason: Dropped(**entry) for reason, entry in info.get(name, {}).items()}
        return cls(out=out, kept=info["splits"], already_there=True, **found)

    def losses(self) -> str:
        """What was dropped, and what belongs to no pair, with examples: for an error."""
        told = (
            f"{what} {reason} ({entry.count:,}), such as {' and '.join(entry.examples[:2])}"
            for what, entries in (("dropped", self.dropped), ("belongs to no pair:", self.unpaired))
            for reason, entry in entries.items()
        )
        return "; ".join(told) or "the source is empty"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        already = " (already prepared; the source was not read again: if it changed, give --overwrite True)"
        table = Table(title=self.out + already * self.already_there, title_justify="left")
        table.add_column("pairs", min_width=12)
        table.add_column("count", justify="right", no_wrap=True)
        table.add_column("examples", overflow="fold", min_width=24)
        # Captions say more than names where captions are the reason. Square brackets are rich's.
        captions = {reason: escape("\n".join(examples)) for reason, examples in self.caption_examples.items()}
        table.add_row("found", f"{self.read:,}")
        for split, count in self.kept.items():
            table.add_row(f"kept: {split}", f"{count:,}")
        for reason, entry in sorted(self.dropped.items(), key=lambda item: -item[1].count):
            examples = captions.get(reason) or escape(", ".join(entry.examples))
            table.add_row(f"dropped: {reason}", f"{entry.count:,}", examples)
        for reason, count in self.captions_dropped.items():
            table.add_row(f"captions dropped of kept pairs: {reason}", f"{count:,}", captions.get(reason))
        if self.captions_cut:
            table.add_row("captions cut", f"{self.captions_cut:,}")
        for reason, entry in self.unpaired.items():
            table.add_row(f"belongs to no pair: {reason}", f"{entry.count:,}", escape(", ".join(entry.examples)))
        yield table
        yield from self.notes
