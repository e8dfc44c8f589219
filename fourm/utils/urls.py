"""URLs without the passwords and signatures that they can hold, for all that is printed, logged or saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SCHEME = r"(?i)\b([a-z][\w+.-]{0,30}:/+)"
# In a text a URL ends with a blank or a quotation mark; the punctuation behind it belongs to the sentence.
_USER = re.compile(_SCHEME + r"""(?:[^\s/@:'"]*:(?!\d*(?:/|\s|$))[^\s'"]*|[^\s/@'"]*)@""")
# One that is cut off before its @, in a text: what is behind a colon and no port, though punctuation may follow that.
_CUT_OFF = re.compile(_SCHEME + r"""(?!\[[^\s/@\]]*\])([^\s/@:'"]*:)(?!\d*[,;.:)\]}]*(?:[/?#\s'"<>]|$))[^\s'"<>]+""")
# At the beginning of what follows a scheme: a colon, and no port behind it. An address in brackets has colons of its own.
_PASSWORD = re.compile(r"(?!\[[^/@\]]*\](?::\d*)?(?:/|$))[^/@:]*:(?!\d*(?:/|$))")
_QUERY = re.compile(_SCHEME + r"""([^\s?#'"<>]*)(?:[?#][^\s'"<>]*[^\s'"<>:,;.)\]}]|[?#](?=[^\s'"<>]))""")


def shown(url: str) -> str:
    """A path as messages name it: a URL without the query and the user, where signatures and passwords are."""
    if not (found := re.match(r"([\w+.-]+:/+)([^?#]*)", url)):
        return url
    scheme, rest = found.groups()
    # What is behind a colon and no port is a password, even if it has slashes in it, or is cut off before its @.
    authority, slash, path = (rest, "", "") if _PASSWORD.match(rest) else rest.partition("/")
    rest = authority.rpartition("@")[2] + slash + path
    cut_off = _PASSWORD.match(rest)
    return f"{scheme}{cut_off[0]}..." if cut_off else scheme + rest


def without_secrets(value: Any) -> Any:
    """``value`` with every URL as :func:`shown` gives it: in a text, and in the values of dictionaries and lists."""
    if isinstance(value, str):
        url = shown(value)
        if url != value and not re.search(r"\s", value):
            return url
        if ":/" not in value:
            return value
        return _QUERY.sub(r"\1\2", _CUT_OFF.sub(r"\1\2...", _USER.sub(r"\1", value)))
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return value
