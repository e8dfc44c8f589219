"""URLs without the passwords and signatures that they can hold, for all that is printed, logged or saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SCHEME = r"(?i)\b([a-z][\w+.-]{0,30}:/+)"
# In a text a URL ends with a blank or a quotation mark; the punctuation behind it belongs to the sentence.
_USER = re.compile(_SCHEME + r"""(?:[^\s/@:'"]*:(?!\d*(?:/|\s|$))[^\s'"]*|[^\s/@'"]*)@""")
_QUERY = re.compile(_SCHEME + r"""([^\s?#'"<>]*)(?:[?#][^\s'"<>]*[^\s'"<>:,;.)\]}]|[?#](?=[^\s'"<>]))""")


def shown(url: str) -> str:
    """A path as messages name it: a URL without the query and the user, where signatures and passwords are."""
    if not re.match(r"[\w+.-]+:/", url):
        return url
    url = re.split("[?#]", url, maxsplit=1)[0]
    # What is behind a colon and no port is a password, even if it has slashes in it.
    user = r".*@" if re.match(r"[\w+.-]+:/+[^/@]*:(?!\d*(/|$))", url) else r"[^/]*@"
    return re.sub(rf"^([\w+.-]+:/+){user}", r"\1", url, flags=re.DOTALL)


def without_secrets(value: Any) -> Any:
    """``value`` with every URL as :func:`shown` gives it: in a text, and in the values of dictionaries and lists."""
    if isinstance(value, str):
        url = shown(value)
        if url != value and not re.search(r"\s", value):
            return url
        return _QUERY.sub(r"\1\2", _USER.sub(r"\1", value)) if ":/" in value else value
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return value
