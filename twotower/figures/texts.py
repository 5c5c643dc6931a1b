"""Texts of prompts as they can be shown: in a line, without control characters."""

from __future__ import annotations

import unicodedata

BOX = "\u25af"
"""What stands for a character that cannot be shown."""


def control_free(text: str, keep: str = "") -> str:
    """A text on one line: line breaks and tabs as signs, other control characters as boxes.

    Parameters
    ----------
    text
        Any text, such as a token's.
    keep
        Control characters that stay as they are, such as line breaks.
    """
    signs = {"\n": "\u21b5", "\t": "\u2192"}
    found = ((c if c in keep else signs.get(c, c)) for c in text)
    return "".join(BOX if unicodedata.category(c) == "Cc" and c not in keep else c for c in found)


def printable(text: str) -> str:
    """A text as matplotlib can draw it: no formula, no line break, no glyph that is missing."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    shown = "".join(c if font.get_char_index(ord(c)) else BOX for c in control_free(text))
    return shown.replace("$", r"\$")
