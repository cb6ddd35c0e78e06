"""Which names a text mentions, whole words and whatever the capitals and marks."""

import re
from collections.abc import Collection

LONGEST = 12
"""Words of a name, at most."""


def plain_name(text: str) -> str:
    """Its words in small letters, so that `Hawaiʻi's` and `hawaiʻi s` are one."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def mentioned(text: str, names: Collection[str]) -> set[str]:
    """Those of the names (each from `plain_name`) whose words stand in the text one after another."""
    words = plain_name(text).split()
    runs = (
        " ".join(words[start:end])
        for start in range(len(words))
        for end in range(start + 1, min(len(words), start + LONGEST) + 1)
    )
    return {run for run in runs if run in names}
