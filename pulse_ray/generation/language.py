"""Whether a text is in the language that was asked for; told only where it is beyond doubt."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import regex

from pulse_ray.text import UNSPACED, words

MAX_LIKELY = 0.01
"""A text is in another language where its own has no larger probability than this, …"""

MIN_OTHER = 0.5
"""… another one has at least this, …"""

MIN_BYTES = 24
"""… and so many bytes (UTF-8) say so: some five words in Latin letters, eight characters of Chinese."""

_NO_LANGUAGE = "zxx"
_SPACE_BETWEEN = regex.compile(rf"(?<={UNSPACED}) (?={UNSPACED})")


def is_foreign(text: str, language: str) -> bool:
    """Whether a text is surely not in a language, names apart: they may be in any, and are told by their capitals.

    Args:
        language: code of ISO 639, one of `config.LANGUAGES`.

    >>> is_foreign("productos sin perfume porque la piel le pica con los otros.", "en")
    True
    >>> is_foreign("a cream such as Crème de Corps Nourrissante for dry skin in winter.", "en")
    False
    """
    spaced = " ".join(word for word in words(text) if not word[0].isupper() and not word[0].isdigit())
    plain = _SPACE_BETWEEN.sub("", spaced)
    if len(plain.encode()) < MIN_BYTES:
        return False
    ranked: dict[str, float] = dict(_identifier().rank(plain))
    likeliest = max(ranked, key=ranked.__getitem__)
    return ranked[language] <= MAX_LIKELY and likeliest != _NO_LANGUAGE and ranked[likeliest] >= MIN_OTHER


@lru_cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    # The module's own identifier gives no probabilities.
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
