"""Captions that say how a picture came about and not what is on it: "photographed on 4 March 2012" (DALL·E App. C).

The paper filters captions that are "mostly boilerplate", with "many date formats". There are more formats than anybody
lists, but few kinds of words in them. So each word of a caption gets its kind, one letter, and what is looked for are kinds:
a month, a day and a year near each other, in whatever order, are a date. Besides these there are the names that cameras,
telephones and programs give to files, and what web pages write where a caption should be (Sharma et al. 2018, §3.1).
"""

from __future__ import annotations

import re
from collections import Counter

MONTH, DAY, YEAR, DATE, TIME, WEEKDAY, SEASON, UNIT, RELATIVE = "MDYFTWSUR"
VERB, NOUN, CAMERA, OF, LITTLE, OTHER = "VNCopx"

_WORDS = {
    MONTH: """jan january feb february mar march apr april may jun june jul july aug august sep sept september oct october
        nov november dec december januar februar märz mai juni juli oktober dezember janvier février mars avril juin
        juillet août septembre octobre novembre décembre enero febrero marzo abril mayo junio julio agosto
        septiembre octubre noviembre diciembre gennaio febbraio aprile maggio giugno luglio settembre ottobre
        dicembre janeiro fevereiro março maio junho julho setembro outubro novembro dezembro januari februari maart
        mei augustus""",
    DAY: """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth
        fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth""",
    YEAR: "twenties thirties forties fifties sixties seventies eighties nineties undated",
    WEEKDAY: """mon tue tues wed thu thur thurs fri sat sun monday tuesday wednesday thursday friday saturday sunday weekend
        mondays tuesdays wednesdays thursdays fridays saturdays sundays""",
    SEASON: """spring summer autumn fall winter morning noon afternoon evening night midnight dawn dusk sunrise sunset
        christmas easter thanksgiving halloween eve holiday holidays vacation birthday""",
    UNIT: """second seconds minute minutes min mins hour hours hr hrs h day days week weeks month months year years
        decade century centuries quarter""",
    RELATIVE: "ago earlier yesterday today tonight last this",
    VERB: """photographed taken took shot snapped captured uploaded posted published created scanned added dated recorded
        modified updated digitized digitised edited downloaded received made developed printed""",
    NOUN: """photo photos photograph photographs pic pics picture pictures image images snapshot snapshots file files
        filename scan scans video videos photographer""",
    CAMERA: """camera phone cellphone smartphone mobile canon nikon sony olympus kodak fujifilm fuji pentax leica panasonic
        lumix samsung iphone ipad android blackberry nokia gopro eos powershot coolpix rebel dslr lens exposure film
        flickr instagram facebook""",
    LITTLE: """a an the on at in from to by for with and or as between before after about around during since until till
        through thru via back i we me us my our these those that was were is are has have been it date dates time
        original originally approx approximately circa ca c early onwards hundred no late mid some sometime
        somewhere unknown credit one two three four five six seven eight nine ten eleven twelve nineteen twenty
        thirty st nd rd th s t o clock am pm z utc gmt est edt cst cdt mst mdt pst pdt cet cest bst ist jst uhr de
        di del le la el den der im um new using above below copyright only""",
}  # fmt: skip
_KIND = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_KIND |= {"of": OF, "second": DAY, "am": LITTLE}

_YEAR = r"(?:1[89]|20)\d\d"
_ROMAN_MONTH = r"(?:I{1,3}|IV|VI{0,3}|IX|XI{0,2})"
_TOKEN = re.compile(
    rf"""(?P<{DATE}>
      (?<!\d){_YEAR}\d{{4}}(?:\d{{6}})?(?!\d)                                # 20120304, 20120304121314
    | (?<!\d)\d{{4}}(?:19|20)\d\d(?!\d)                                      # 04032012
    | {_YEAR}(?P<iso>[-/.:])\d\d?(?P=iso)\d\d?(?!\d)                         # 2012-03-04, 2012:03:04, 2012/3/4
    | (?<!\d)\d\d?(?P<sep>[-/.])\d\d?(?P=sep)(?:{_YEAR}|'?\d\d)(?!\d)        # 3/4/2012, 04.03.12
    | (?<!\d)\d\d?[-/]{_YEAR}(?!\d)                                          # 3/2012
    | (?<!\d)\d\d?(?P<roman>[-/.\s]){_ROMAN_MONTH}(?P=roman){_YEAR}(?!\d)    # 4/III/2012
    | {_YEAR}年\d\d?月(?:\d\d?日)?
    )
    | (?P<{TIME}>(?<!\d)\d\d?[:.h]\d\d(?:[:.]\d\d)?(?:\.\d+)?(?!\d)|(?<!\d)\d\d?\s?[ap]\.?m\b|(?<!\d)\d\d?-\d\d-\d\d(?!\d)
        |(?<=_)\d{{6}}(?!\d)|(?<=\s)[+-]\d{{4}}\b)
    | (?P<{YEAR}>(?<!\d){_YEAR}(?!\d)|(?<!\w)'\d\d(?!\d)|(?<=-)\d\d(?!\w)|(?<!\d)\d0'?s\b)
    | (?P<{MONTH}{DAY}>(?<![\d/])\d\d?/\d\d?(?![\d/]))                       # 6/18
    | (?P<{SEASON}>\bq[1-4]\b)
    | (?P<{DAY}>(?<!\d)\d\d?(?!\d))
    | (?P<{OTHER}>\d+)
    | (?P<word>[^\W\d_]+)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_IMAGE_FILE = re.compile(
    r"""\b(?:
      [\w-]+\.(?:jpe?g|png|gif|tiff?|bmp|heic|mp4|mov)\b                # anything.jpg
    | _?(?:fb_)?(?:img|mg|dsc[nf]?|pict|image|photo|vid|mvi|gopr|scan|dji)[-_\s]?\d{3,}[\w-]*
    | [a-z]{2,5}_?\d{4,}\b | p\d{7} | 10\d_\d{4} | untitled(?:[-_\s]?\d+)?
    | (?:screen\s?shot|whatsapp\s+image|photo)\s+(?:from\s+)?(?=[12]\d{3}-)  # and a date
    | (?:image|photo|picture|pic)\s(?:\(\d+\)|0\d+)$
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_THING = r"(?:photo|photograph|image|picture|illustration|vector|clipart)s?(?:graphy)?"
_PHRASES = re.compile(
    r"\b(?:(?:click|tap)(?: (?:here|on))?(?: (?:the |this )?(?:image|photo|picture))?(?: (?:to|for))? "
    r"(?:(?:view|see) )?(?:a |the )?(?:enlarge|zoom|full|large|big)[a-z-]*(?: (?:size|image|version|view|picture|photo)d?)*"
    rf"|(?:royalty[- ]free )?stock {_THING}|royalty[- ]free {_THING}"
    r"|olympus digital camera|kodak digital (?:still )?camera|sony dsc"
    r"|image may contain|may be an image of|no automatic alt text available|embedded image permalink"
    r"|(?:profile|cover) (?:photo|picture|image)|image not available|no (?:image|photo|picture) available|image result for"
    rf"|all rights reserved|(?:{_THING} )?copyright (?:\(c\) |© ?)?{_YEAR}|{_THING} (?:credits?|courtesy of|via))\b",
    re.IGNORECASE,
)

# In a row of kinds: what belongs to a date and what may stand between; what a picture is said to be of; words that lead up to
# a time and are not said of a thing ("a shot glass"); times that are boilerplate where these do; times that always are.
_LITTLES = rf"[{LITTLE}{OF}]*"
_RUN = re.compile(rf"[{MONTH}{DAY}{YEAR}{TIME}{WEEKDAY}{SEASON}{UNIT}{LITTLE}{OF}]+")
_SUBJECT = re.compile(rf"{NOUN}{OF}{LITTLE}*{OTHER}")
_LEAD = re.compile(rf"{VERB}(?!{OTHER})")
_TIME_OF_LEAD = re.compile(
    rf"[{MONTH}{YEAR}{WEEKDAY}]|{RELATIVE}{_LITTLES}[{SEASON}{UNIT}{VERB}]|[{UNIT}{DAY}]{RELATIVE}|{VERB}{RELATIVE}|{TIME}"
)
_TIME_ALONE = re.compile(
    rf"{YEAR}|[{NOUN}{WEEKDAY}].*({MONTH}{_LITTLES}{DAY}|{DAY}{_LITTLES}{MONTH}|{RELATIVE}[{WEEKDAY}{SEASON}{UNIT}])"
)
_MAY_HAVE = re.compile(rf"[0-9]|ties\b|undated|untitled|\.\w|{'|'.join(_WORDS[VERB].split())}")


def is_boilerplate(caption: str) -> bool:
    """Whether whole dates, file names and stock phrases, with the words around them that only tell of a picture's making,
    are more than half of the caption's letters and digits.

    Of times that are vaguer (a year, "last Tuesday") they must be three quarters where a word such as "taken" leads up to
    them, and all where none does: what is seen may be of 1890, too.
    """
    rest = _PHRASES.sub(" ", caption)
    if not _MAY_HAVE.search(rest.lower()):  # most have none, and are spared what takes longer
        return len(rest) < len(caption) and 2 * _size(rest) < _size(caption)
    rest = _IMAGE_FILE.sub(" ", rest)
    sizes: Counter[str] = Counter()
    kinds = ""
    waiting = 0
    for token in _TOKEN.finditer(rest):
        text, group = token[0], token.lastgroup
        kind = _KIND.get(text.lower(), OTHER) if group == "word" else group or OTHER
        if kind == DAY and kinds.endswith(OTHER) and rest.startswith(",", token.end()):
            kind = OTHER  # "Apollo 8, December 1968"
        kinds += kind
        size = _size(text)
        if kind in (LITTLE, OF):
            waiting += size
            continue
        sizes[kind[0]] += size + (waiting if kind == OTHER else 0)  # "on guard" says what is seen, "on Monday" does not
        waiting = 0
    if _SUBJECT.search(kinds):  # a "photograph of" somebody
        sizes[OTHER] += sizes.pop(NOUN)
    named = _size(caption) - _size(rest)
    told = named + sizes.total() - sizes[OTHER]
    if named or DATE in kinds or any({MONTH, DAY, YEAR} <= set(run) for run in _RUN.findall(kinds)):
        return told > sizes[OTHER]
    if _LEAD.search(kinds) and _TIME_OF_LEAD.search(kinds):
        return told > 3 * sizes[OTHER]
    camera = sizes[CAMERA] if MONTH not in kinds else 0  # a camera of 1950 may be what is seen
    return not sizes[OTHER] + camera and _TIME_ALONE.search(kinds) is not None


def _size(text: str) -> int:
    """How many letters and digits it has."""
    return sum(map(str.isalnum, text))
