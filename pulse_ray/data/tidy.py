"""Readable fields of items from what scraping left of them."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from pulse_ray.text import clean

RAW_DESCRIPTION_CHARS, DESCRIPTION_CHARS, TITLE_CHARS = 6000, 600, 250

# What scraping leaves in text fields besides tags: the page's scripts, and place holders.
_SCRIPT = re.compile(r"getTime\(\)|function ?\(|^\s*var \w+ ?=")
_PLACEHOLDER = re.compile(r"(SPID )?SHORT DESCRIPTION NOT AVAILABLE\W*", re.IGNORECASE)
_BRAND_BY = re.compile(r"\s*by\s*\n\s*")
_BRAND_PAGE = re.compile(r"Visit Amazon's (.*) Page")


def tidy_item(title: str | None, description: str | None, brand: str | None, categories: list[str]) -> dict[str, Any]:
    """An item's raw fields without markup, debris and place holders; what is unreadable becomes empty.

    >>> tidy_item('<span class="a-size', "var aPageStart = (new Date()).getTime();", "by\\n   Fernleaf", ["Tea", "Tea"])
    {'title': '', 'description': '', 'brand': 'Fernleaf', 'categories': ['Tea']}
    """
    brand = clean(_BRAND_BY.sub("", brand)) if brand and not _SCRIPT.search(brand) else ""
    page = _BRAND_PAGE.fullmatch(brand)
    kinds = (clean(category) for category in categories)
    return {
        "title": _readable(title, TITLE_CHARS),
        "description": _readable(description, DESCRIPTION_CHARS),
        "brand": page.group(1) if page else brand,
        "categories": list(dict.fromkeys(kind for kind in kinds if kind)),
    }


def _readable(raw: str | None, chars: int) -> str:
    if not raw or _SCRIPT.search(raw):
        return ""
    text = _PLACEHOLDER.sub("", clean(raw)).strip()
    return text if len(text) <= chars else textwrap.shorten(text, chars, placeholder=" …")
