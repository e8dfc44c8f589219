"""Redact the passwords and signatures in URLs before anything is printed, logged or saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SCHEME = r"(?i)\b([a-z][\w+.-]{0,30}:/+)"
# In running text, a URL ends at whitespace or a quotation mark; punctuation at its end belongs to the sentence.
_USER = re.compile(_SCHEME + r"""(?:[^\s/@:'"]*:(?!\d*(?:/|\s|$))[^\s'"]*|[^\s/@'"]*)@""")
# A URL in running text that was truncated before its @: a colon that is not followed by a port and punctuation.
_TRUNCATED = re.compile(_SCHEME + r"""(?!\[[^\s/@\]]*\])([^\s/@:'"]*:)(?!\d*[,;.:)\]}]*(?:[/?#\s'"<>]|$))[^\s'"<>]+""")
# Right after a scheme: a colon that is not followed by a port. An IPv6 address in brackets has colons of its own.
_PASSWORD = re.compile(r"(?!\[[^/@\]]*\](?::\d*)?(?:/|$))[^/@:]*:(?!\d*(?:/|$))")
_QUERY = re.compile(_SCHEME + r"""([^\s?#'"<>]*)(?:[?#][^\s'"<>]*[^\s'"<>:,;.)\]}]|[?#](?=[^\s'"<>]))""")


def redact_url(url: str) -> str:
    """Return a URL without its query and user, which may hold signatures and passwords; other paths stay the same."""
    match = re.match(r"([\w+.-]+:/+)([^?#]*)", url)
    if not match:
        return url
    scheme, rest = match.groups()
    # Text after a colon that is not a port is a password, even if it contains slashes or is truncated before its @.
    authority, slash, path = (rest, "", "") if _PASSWORD.match(rest) else rest.partition("/")
    rest = authority.rpartition("@")[2] + slash + path
    truncated = _PASSWORD.match(rest)
    return f"{scheme}{truncated[0]}..." if truncated else scheme + rest


def redact(value: Any) -> Any:
    """Apply :func:`redact_url` to every URL in ``value``: in a text, and in the values of dictionaries and lists."""
    if isinstance(value, str):
        url = redact_url(value)
        if url != value and not re.search(r"\s", value):
            return url
        if ":/" not in value:
            return value
        return _QUERY.sub(r"\1\2", _TRUNCATED.sub(r"\1\2...", _USER.sub(r"\1", value)))
    if isinstance(value, Mapping):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return value
