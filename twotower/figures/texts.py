"""Texts of prompts for display: on one line, without control characters."""

from __future__ import annotations

import unicodedata

BOX = "\u25af"
"""Replacement for characters that cannot be shown."""


def control_free(text: str, keep: str = "") -> str:
    """Return a text on one line: line breaks and tabs as signs, other control characters as boxes.

    Parameters
    ----------
    text
        Any text, such as a token's.
    keep
        Control characters to keep, such as line breaks.
    """
    signs = {"\n": "\u21b5", "\t": "\u2192"}
    found = ((c if c in keep else signs.get(c, c)) for c in text)
    return "".join(BOX if unicodedata.category(c) == "Cc" and c not in keep else c for c in found)


def compared(by_prompt: bool, n_labels: int) -> str:
    """Return what decides whether an answer is correct, in words.

    Parameters
    ----------
    by_prompt
        Whether prompts have answers of their own.
    n_labels
        Number of labels, or of a prompt's answers; a single one must be the most likely text.
    """
    if not by_prompt:
        return "between the labels"
    return "between the answers" if n_labels > 1 else "of the whole answer"


def printable(text: str) -> str:
    """Return a text for matplotlib: without formulas, line breaks or missing glyphs."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    shown = "".join(c if font.get_char_index(ord(c)) else BOX for c in control_free(text))
    return shown.replace("$", r"\$")
