"""Captions that say how a picture came about and not what is on it: "photographed on 4 March 2012" (DALL·E App. C).

The paper filters captions that are "mostly boilerplate", with "many date formats"; mostly means more than half here.
Recognized are dates with what leads up to them, the names that cameras, telephones and programs give to files, and what
web pages write where a caption should be (Sharma et al. 2018, §3.1).
"""

from __future__ import annotations

import re

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec)[a-z]*\.?"
_ROMAN_MONTH = r"(?:I{1,3}|IV|VI{0,3}|IX|XI{0,2})"
_WEEKDAY = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?,?\s+)?"
_ORDINAL = (
    r"(?:twenty-|thirty-)?(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|thirteenth"
    r"|fourteenth|fifteenth|sixteenth|seventeenth|eighteenth|nineteenth|twentieth|thirtieth)"
)
_DAY = rf"(?:\d{{1,2}}(?:st|nd|rd|th)?(?:\s+day)?|{_ORDINAL})"
_YEAR = r"(?:1[89]|20)\d\d"
_SEASON = r"(?:(?:early|late|mid)[\s-]?)?(?:spring|summer|autumn|fall|winter)"

# Dates that are nothing else, with or without words before them.
_DATE = rf"""{_WEEKDAY}(?:
      {_YEAR}\d{{4}}(?:\d{{6}})?(?!\d)                          # 20120304, 20120304121314
    | {_YEAR}(?P<iso>[-/.:])\d\d?(?P=iso)\d\d?(?!\d)            # 2012-03-04, 2012:03:04, 2012/3/4
    | \d\d?[/-]{_YEAR}\b                                       # 3/2012
    | \d{{1,2}}(?P<sep>[-/.])\d{{1,2}}(?P=sep)(?:{_YEAR}|'?\d\d)(?!\d)  # 3/4/2012, 04.03.12
    | \d{{4}}(?:19|20)\d\d(?!\d)                               # 04032012
    | \d{{1,2}}(?P<roman>[-/.\s]){_ROMAN_MONTH}(?P=roman){_YEAR}  # 4/III/2012
    | {_MONTH}[\s-]+{_DAY}\s*,?[\s-]+(?:{_YEAR}|'\d\d)\b       # March 4th, 2012, Mar-04-2012, March 4 '12
    | (?:the\s+)?{_DAY}[\s.-]+(?:of\s+)?{_MONTH},?(?:\s+|[-.]|\s*')?(?:{_YEAR}|(?<=[-'])\d\d)\b
                                                               # 4 March 2012, the 4th of March, 2012, 04-Mar-2012, 4-Mar-12
    | {_YEAR}[\s-]*{_MONTH}[\s-]*{_DAY}\b                      # 2012 March 4, 2012Mar4
    | {_MONTH},?\s+{_YEAR}\b                                   # March 2012
    | (?:the\s+)?{_SEASON}\s+(?:of\s+)?{_YEAR}\b               # Summer 2012
    | (?:c\.|ca\.|circa)\s*{_YEAR}s?\b                         # circa 1905
    )"""
# Dates only behind words that lead up to one: "in 2012" may belong to what is seen.
_VAGUE_DATE = rf"""(?:
      {_MONTH}\s+{_DAY}\b | (?:the\s+)?{_DAY}\s+(?:of\s+)?{_MONTH}      # December 25th
    | (?:between\s+)?{_YEAR}(?:\s*(?:-|–|and|to)\s*{_YEAR})?\b
    | yesterday | today | (?:last|this)\s+(?:night|morning|afternoon|evening|week|month|year) | \w+day\b
    | \d+\s+(?:minute|hour|day|week|month|year)s?\s+ago
    )"""
_ZONE = r"(?:\s*(?:Z|UTC|GMT|[+-]\d\d:?\d\d))?"
_CLOCK = rf"(?:\d{{1,2}}[-:.]?\d\d(?:[-:.]?\d\d)?(?:\.\d+)?\s*(?:[ap]\.?m\.?)?{_ZONE})"
_TIME = rf"(?:[T_,]?\s*(?:at\s+)?{_CLOCK})?"
_VERB = r"(?:photographed|taken|shot|snapped|captured|uploaded|posted|published|created|scanned|added|dated|recorded|modified)"
_NOUN = r"(?:(?:this|the|a|my)\s+)?(?:file\s+)?(?:photo(?:graph)?|picture|pic|image|snapshot|file|scan|video)s?"
_WORDS = r"(?:[\s,:]+(?:\d+[^\W\d]|[^\W\d])\w*){0,4}?"  # photographed by me, uploaded to an album, taken in the morning
_ON = rf"[\s,:]*(?:at\s+{_CLOCK}\s*)?(?:on|at|in|during|:)?\s*(?:the\s+(?=\d))?"
_TAKEN = rf"(?:date\s+)?(?:{_NOUN}\s+)?(?:(?:was|were|is)\s+)?{_VERB}"
_FROM = rf"{_NOUN}(?:\s+by(?:\s+\w+){{1,2}})?\s+(?:from|of|on)\s+|{_NOUN},?\s+(?=c|[12])|(?:{_NOUN}\s+)?date:?\s*"
_LEAD = rf"(?:{_TAKEN}{_WORDS}{_ON}|{_FROM})"
_CLOSE_LEAD = rf"(?:{_TAKEN}(?:\s+back)?{_ON}|{_FROM})"
_PICTURE_FILE = r"""
      [\w-]+\.(?:jpe?g|png|gif|tiff?|bmp|heic|mp4|mov)\b                # anything.jpg
    | _?(?:img|mg|dsc[nf]?|pict|image|photo|vid|mvi|gopr|scan)[-_\s]?\d{3,}[\w-]*
    | [a-z]{2,5}_?\d{4,}\b | p\d{7} | 10\d_\d{4} | untitled(?:[-_\s]?\d+)?
    | (?:screen\s?shot|whatsapp\s+image|photo)\s+(?:from\s+)?(?=[12]\d{3}-)  # and a date
    """

_DATES = re.compile(
    rf"\b(?:{_LEAD}?{_DATE}{_TIME}|{_CLOSE_LEAD}{_VAGUE_DATE}{_TIME}|{_PICTURE_FILE})", re.IGNORECASE | re.VERBOSE
)
_KIND = r"(?:photo|photograph|image|picture|illustration|vector|clipart)s?(?:graphy)?"
_PHRASES = re.compile(
    r"\b(?:(?:click|tap)(?: (?:here|on))?(?: (?:the |this )?(?:image|photo|picture))?(?: (?:to|for))? "
    r"(?:(?:view|see) )?(?:a |the )?(?:enlarge|zoom|full|large|big)[a-z-]*(?: (?:size|image|version|view|picture|photo)d?)*"
    rf"|(?:royalty[- ]free )?stock {_KIND}|royalty[- ]free {_KIND}"
    r"|olympus digital camera|kodak digital (?:still )?camera|sony dsc"
    r"|image may contain|may be an image of|no automatic alt text available|embedded image permalink"
    r"|(?:profile|cover) (?:photo|picture|image)|image not available|no (?:image|photo|picture) available|image result for"
    rf"|all rights reserved|(?:{_KIND} )?copyright (?:\(c\) |© ?)?{_YEAR}|{_KIND} (?:credits?|courtesy of|via))\b",
    re.IGNORECASE,
)
_DATE_OR_FILE = re.compile(r"\d|day\b|ago\b|this |last |untitled|\.\w", re.IGNORECASE)


def is_boilerplate(caption: str) -> bool:
    """Whether dates, file names and stock phrases are more than half of the caption's letters and digits."""
    rest = _PHRASES.sub(" ", caption)
    if _DATE_OR_FILE.search(rest):  # most have none, and are spared what takes ten times as long
        rest = _DATES.sub(" ", rest)
    return len(rest) < len(caption) and 2 * sum(map(str.isalnum, rest)) < sum(map(str.isalnum, caption))
