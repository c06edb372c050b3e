"""Owns what a credential looks like, and its removal from texts and records. Pure; imports nothing of the house.

What nobody can know to be a secret (a password under an ordinary name) is not found: see SECURITY.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
"""What stands in the place of a credential."""

_NAMES = (
    r"(?:password|passwd|passphrase|secret|(?:api|access|secret|private|auth)[_-]?key(?:[_-]?id)?|credentials?|"
    r"(?:\w_|^)?token)"
)
_SECRET_NAME = re.compile(rf"(?i){_NAMES}$")
_COUNTED = re.compile(r"(?i)token$")

# A credential in any URI: everything between "//" and the last "@" before the path.
_USERINFO = re.compile(r"://[^/\s@]*(?:@[^/\s@]*)*@")
# A password for a database is often written with its "/" unescaped.
_WORD = re.compile(r"\S+")
_DATABASE = re.compile(r"(?i)(?:mongodb|mysql|postgres)[a-z0-9+]*://")
_SECRET_QUERY = re.compile(r"(?i)([?&](?:\w*password|passwd|token|secret|access_key|secret_key|sig|signature)=)[^&\s]*")
_VALUE = r"""(?:"[^"\n]*"|'[^'\n]*'|["']?[^\s,;&"'(){}\[\]][^\s,;&"'{}\[\]]*)"""
_ASSIGNED = re.compile(
    rf"(?i)(?<!\w)(\w*(?:password|passwd|passphrase|secret|(?:api|access|secret|private|auth)[_-]?key|token)"
    rf"(?:[_-]?id)?[\"']?\s?=\s?){_VALUE}"
)
# "unexpected token: x" is no secret: where a colon follows, a bare `token` must be quoted or stand in braces.
_MAPPED = re.compile(
    r"(?i)((?<!\w)(?:\w*(?:password|passwd|passphrase|(?:api|access|secret|private|auth)[_-]?key|secret)|\w+_token)"
    rf"[\"']?:\s?|(?<!\w)token[\"']:\s?|[{{,]\s?token:\s?){_VALUE}"
)
_AUTHORIZATION = re.compile(
    r"(?i)((?<!\w)bearer\s)[\w.~+/=-]{6,}|(authorization[\"']?\s?[:=]\s?[\"']?\w+\s)[^\s\"',}]+"
)
_ACCESS_KEY = re.compile(r"(?<!\w)(?:AKIA|ASIA)[0-9A-Z]{16}(?!\w)")
_ARGUMENT = re.compile(r"(?s)(?P<name>(?:--[\w-]+=)?[\w.-]+)=(?P<value>.+)")


def redact(text: str) -> str:
    """Return a text with what looks like a credential in it replaced by `***`: in URIs, and after telling names."""
    if "://" in text:
        text = _USERINFO.sub(f"://{HIDDEN}@", _WORD.sub(_without_userinfo, text))
    text = _SECRET_QUERY.sub(rf"\1{HIDDEN}", text)
    for pattern in (_ASSIGNED, _MAPPED):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    text = _AUTHORIZATION.sub(lambda match: f"{match[1] or match[2]}{HIDDEN}", text)
    return _ACCESS_KEY.sub(HIDDEN, text)


def redact_argument(word: str) -> str:
    """Return a word of a command line without credentials: `api_key=a b` has one with a space in it."""
    match = _ARGUMENT.fullmatch(word)
    if match and is_secret_name(match["name"]):
        return f"{match['name']}={HIDDEN}"
    return redact(word)


def redact_arguments(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without credentials: `--token abc` has one in a word of its own."""
    before = ["", *words]
    return [
        HIDDEN if flag.startswith("--") and is_secret_name(flag) and not word.startswith("-") else redact_argument(word)
        for flag, word in zip(before, words, strict=False)
    ]


def redact_all(value: Any) -> Any:
    """Return a JSON value without credentials: `redact` is applied to every string, and what has a telling key goes."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: _hidden(key, item) if is_secret_name(key) else redact_all(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(item) for item in value]
    return value


def is_secret_name(name: Any) -> bool:
    """Tell whether what has this name is a credential: `api_key`, `db_password`, `token`."""
    return isinstance(name, str) and _SECRET_NAME.search(name) is not None


def hidden_in(value: Any) -> bool:
    """Tell whether a credential was removed from a JSON value."""
    if isinstance(value, Mapping):
        return any(hidden_in(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(hidden_in(item) for item in value)
    return isinstance(value, str) and HIDDEN in value


def _hidden(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {inner: _hidden(inner, item) for inner, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hidden(key, item) for item in value]
    # A number of tokens is none of them; nothing is nobody's secret.
    number = isinstance(value, (int, float)) and _COUNTED.search(key) is not None
    return value if value is None or value == "" or isinstance(value, bool) or number else HIDDEN


def _without_userinfo(match: re.Match[str]) -> str:
    word = match[0]
    scheme, end = _DATABASE.search(word), word.rfind("@")
    return f"{word[: scheme.end()]}{HIDDEN}{word[end:]}" if scheme and end >= scheme.end() else word
