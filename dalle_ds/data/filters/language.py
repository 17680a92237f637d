"""Whether a short caption is English (DALL·E App. C filters by language, with cld3, which no current Python can install).

`py3langid` gives the likelihood of a text under a naive Bayes model of byte n-grams for each language. Its probabilities
say little of captions of a few words, and all too surely; the difference of log-likelihoods, which grows with the evidence,
does better. `docs/data.md` compares it with lingua-language-detector.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from dalle_ds.errors import ConfigError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# fmt: off
LANGUAGES = (
    "en", "de", "fr", "es", "pt", "it", "nl", "sv", "da", "no", "fi", "pl", "cs", "sk", "ro", "hu", "tr", "id", "ms", "vi",
    "tl", "ru", "uk", "el", "bg", "ja", "zh", "ko", "ar", "he", "hi", "th", "fa", "ca", "hr", "sr", "sl", "et", "lv", "lt",
    "bn", "ta", "te", "mr", "ur", "ka", "hy",
)
# fmt: on
"""ISO 639-1 codes that English is compared with. The model's other hundred are rare on the web, and draw captions that are
mere names."""


def foreign_margin(caption: str) -> float:
    """By how many nats the likeliest other language explains a caption better than English does.

    Returns:
        Negative where English is likeliest; infinite where most letters are of another script.

    Raises:
        ConfigError: py3langid is not installed.
    """
    letters = [char for char in caption if char.isalpha()]
    if 2 * sum(char < "\u0250" for char in letters) < len(letters):  # up to here, Latin
        return float("inf")
    scores = dict(_identifier().rank(caption.lower()))
    english = scores.pop("en")
    return float(max(scores.values()) - english)


@cache
def _identifier() -> LanguageIdentifier:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ConfigError(
            "filters.foreign_margin needs py3langid, which is not installed: pip install dalle-ds[filters]"
        ) from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(LANGUAGES))
    return identifier
