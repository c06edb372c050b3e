"""Owns how a text that a stranger may have written is shown: nothing in it can steer a terminal. Pure."""

from __future__ import annotations

import unicodedata

# Control characters, those that reorder the text around them, lone surrogates, private ones, line separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: str, *, keep: str = "") -> str:
    r"""Return a text with every character that is not seen, or that does something, written as `\x1b` or `\u202e`.

    Args:
        text: Any text.
        keep: Characters that stay as they are, such as line breaks.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(c) if c not in keep and unicodedata.category(c) in _HIDDEN else c for c in text)


def printable_json(text: str) -> str:
    r"""Return JSON with such characters written as JSON's own escapes; the document stays the same."""
    if text.isascii() and "\x7f" not in text:
        return text
    return "".join(
        "".join(f"\\u{unit:04x}" for unit in _utf16(c)) if c != "\n" and unicodedata.category(c) in _HIDDEN else c
        for c in text
    )


def _shown(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _utf16(character: str) -> list[int]:
    content = character.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(content[at : at + 2], "big") for at in range(0, len(content), 2)]
