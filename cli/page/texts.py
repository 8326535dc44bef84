"""Continuations of the same prompt side by side, with the words that differ marked."""

import re
from difflib import SequenceMatcher

from markupsafe import Markup


def marked(text: str, other: str) -> Markup:
    """`text` with the words marked that `other` does not have in their place."""
    mine, theirs = _words(text), _words(other)
    matches = SequenceMatcher(a=mine, b=theirs, autojunk=False).get_matching_blocks()
    made, at = Markup(), 0
    for match in matches:
        if match.a > at:
            words = "".join(mine[at : match.a])
            bare = words.lstrip()
            made += words[: len(words) - len(bare)]
            made += Markup("<mark>{}</mark>").format(bare) if bare else ""
        made += "".join(mine[match.a : match.a + match.size])
        at = match.a + match.size
    return made


def difference(text: str, dense: str) -> str:
    """How far a text is that of the dense model, in words."""
    if text == dense:
        return "the dense model's text, word for word"
    same = 0
    for mine, theirs in zip(_words(text), _words(dense), strict=False):
        if mine != theirs:
            break
        same += 1
    return f"differs from word {same + 1} on"


def _words(text: str) -> list[str]:
    """Words with the white space before them."""
    return re.findall(r"\s*\S+|\s+$", text)
