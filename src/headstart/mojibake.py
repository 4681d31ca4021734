"""Mojibake: texts that were decoded with another encoding than they were written in, mended.

Goes in: a text. Comes out: what its author wrote, as far as that can be told; a sound text as it is. What a
model learns from and what it is asked later pass through here alike.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

# Bytes that are not UTF-8 travel through the parsers as lone surrogates (PEP 383).
STRAY = re.compile("[\ud800-\udfff]+")


def mended(text: str) -> str:
    """The text with its encoding repaired (ftfy: Speer 2019), and nothing else about it changed.

    Entities, curly quotes, widths and line breaks are the author's.
    """
    if text.isascii():
        return text
    import ftfy

    found: str = ftfy.fix_text(windows(text), _encoding_only())
    return found


@cache
def _encoding_only() -> Any:
    """What ftfy is to look after."""
    import ftfy

    return ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )


def escaped(text: str) -> str:
    r"""A text as UTF-8 can hold it: a byte of a file's name that is not UTF-8 becomes ``\udc..``."""
    return text.encode("utf-8", "backslashreplace").decode()


def windows(text: str) -> str:
    """Stray bytes read as Windows-1252, the usual culprit; the few that it leaves undefined as Latin-1."""

    def decoded(stray: re.Match[str]) -> str:
        try:
            data = stray[0].encode("ascii", "surrogateescape")
        except UnicodeEncodeError:  # half an emoji, from an escape in JSON
            return "\ufffd"
        try:
            return data.decode("cp1252")
        except UnicodeDecodeError:
            return data.decode("latin-1")

    return text if text.isascii() else STRAY.sub(decoded, text)
