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
_DAY = rf"(?:\d{{1,2}}(?:st|nd|rd|th)?|{_ORDINAL})"
_YEAR = r"(?:1[89]|20)\d\d"
_SHORT_YEAR = rf"(?:{_YEAR}|'?\d\d)\b"

# Dates that are nothing else, with or without words before them.
_DATE = rf"""{_WEEKDAY}(?:
      {_YEAR}(?P<iso>[-/.:]?)\d\d(?P=iso)\d\d(?![\d])          # 2012-03-04, 2012:03:04, 20120304
    | \d{{1,2}}(?P<sep>[-/.])\d{{1,2}}(?P=sep){_SHORT_YEAR}    # 3/4/2012, 04.03.12
    | \d{{1,2}}(?P<roman>[-/.\s]){_ROMAN_MONTH}(?P=roman){_YEAR}  # 4/III/2012
    | {_MONTH}[\s-]+{_DAY}\s*,?[\s-]+(?:{_YEAR}|'\d\d)\b       # March 4th, 2012, Mar-04-2012, March 4 '12
    | (?:the\s+)?{_DAY}[\s-]+(?:of\s+)?{_MONTH},?(?:\s+|-|\s*')(?:{_YEAR}|(?<=[-'])\d\d)\b
                                                               # 4 March 2012, the 4th of March, 2012, 04-Mar-2012, 4-Mar-12
    | {_YEAR}[\s-]+{_MONTH}[\s-]+{_DAY}\b                      # 2012 March 4
    | {_MONTH},?\s+{_YEAR}\b                                   # March 2012
    )"""
# Dates only behind words that lead up to one: "in 2012" may belong to what is seen.
_VAGUE_DATE = rf"""(?:
      {_MONTH}\s+{_DAY}\b | (?:the\s+)?{_DAY}\s+(?:of\s+)?{_MONTH}      # December 25th
    | (?:(?:the\s+)?(?:early|late)?\s*(?:spring|summer|autumn|fall|winter)\s+(?:of\s+)?)?{_YEAR}\b
    | yesterday | today | last\s+(?:night|week|month|year)
    )"""
_ZONE = r"(?:\s*(?:Z|UTC|GMT|[+-]\d\d:?\d\d))?"
_TIME = rf"(?:[T_,]?\s*(?:at\s+)?\d{{1,2}}[:.]?\d\d(?:[:.]?\d\d)?(?:\.\d+)?\s*(?:[ap]\.?m\.?)?{_ZONE})?"
_VERB = r"(?:photographed|taken|shot|captured|uploaded|posted|published|created|scanned|added|dated|recorded)"
_NOUN = r"(?:(?:this|the|a)\s+)?(?:file\s+)?(?:photo(?:graph)?|picture|pic|image|snapshot|file|scan)"
_LEAD = (
    rf"(?:(?:date\s+)?(?:{_NOUN}\s+)?(?:(?:was|were|is)\s+)?{_VERB}\s*(?:on|at|in|:)?\s*(?:the\s+(?=\d))?"
    rf"|{_NOUN}\s+(?:from|of|on)\s+)"
)
_CAMERA_FILE = r"""
      (?:img|dsc[nf]?|pict|image|photo|vid|mvi)[-_\s]?\d{3,}[\w-]*(?:\.(?:jpe?g|png|gif|tiff?|mp4|mov))?
    | p\d{7}(?:\.jpe?g)?
    | (?:screen\s?shot|whatsapp\s+image|photo)\s+(?=[12]\d{3}-)       # and a date
    """

_DATES = re.compile(
    rf"\b(?:{_LEAD}?{_DATE}{_TIME}|{_LEAD}{_VAGUE_DATE}{_TIME}|{_CAMERA_FILE})", re.IGNORECASE | re.VERBOSE
)
_PHRASES = re.compile(
    r"\b(?:click (?:here |on )?(?:(?:the |this )?(?:image|photo|picture) )?(?:to|for) "
    r"(?:enlarge|zoom|(?:view|see)? ?(?:a |the )?"
    r"(?:full|large|big)[a-z-]*)(?: (?:size|image|version|view|picture|photo)d?)*"
    r"|(?:royalty[- ]free )?stock (?:photo|photograph|image|picture|illustration|vector)s?(?:graphy)?"
    r"|image may contain|may be an image of|no automatic alt text available|embedded image permalink"
    r"|(?:profile|cover) (?:photo|picture|image)|image not available|no (?:image|photo|picture) available|image result for"
    r"|(?:all rights reserved|photo credits?|photo courtesy))\b",
    re.IGNORECASE,
)
_DIGIT = re.compile(r"\d")


def is_boilerplate(caption: str) -> bool:
    """Whether dates, file names and stock phrases are more than half of the caption's letters and digits."""
    rest = _PHRASES.sub(" ", caption)
    if _DIGIT.search(rest):  # a tenth of the time where there is none
        rest = _DATES.sub(" ", rest)
    return len(rest) < len(caption) and 2 * sum(map(str.isalnum, rest)) < sum(map(str.isalnum, caption))
