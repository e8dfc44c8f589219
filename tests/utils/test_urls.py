import pytest

from fourm.utils.errors import UserError, sanitize
from fourm.utils.urls import redact, redact_url


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("https://me:secret@host/a.tar: no", "https://host/a.tar: no"),
        ("at 'https://host/a.tar?X-Amz-Signature=secret'.", "at 'https://host/a.tar'."),
        ("see https://host/a?token=secret: cut off", "see https://host/a: cut off"),
        ("s3://key:se/secret@bucket/a and s3://b/c", "s3://bucket/a and s3://b/c"),
        ("HTTPS://host/#secret", "HTTPS://host/"),
        ("https://me:sec ret@host/a", "https://host/a"),
        ("https://me:secret", "https://me:..."),
        ("https://me:se/cret", "https://me:..."),
        ("https://me:1secret: cut off", "https://me:... cut off"),
        ("at https://me:...", "at https://me:..."),
        (
            "from 'http://[::1]:80/x', http://host:9, http://host:9: no",
            "from 'http://[::1]:80/x', http://host:9, http://host:9: no",
        ),
        ("such as tcp://HOST:29500 (http://host:80).", "such as tcp://HOST:29500 (http://host:80)."),
        ("http://host:9000/a is a@b?", "http://host:9000/a is a@b?"),
        ("/data/a@b?c#d", "/data/a@b?c#d"),
        ("a cup: what?", "a cup: what?"),
    ],
)
def test_redacted_texts_lose_only_the_secrets_of_their_urls(text, found):
    if text != "https://me:sec ret@host/a":
        assert redact(text) == found
        assert str(UserError(text)) == sanitize(text) == found
    else:
        assert redact_url(text) == found


def test_nested_values_are_redacted():
    found = redact({"a": ["https://h/x?secret", 1], "b": {"c": ("s3://u:secret@b/k", None)}, "d": "plain"})
    assert found == {"a": ["https://h/x", 1], "b": {"c": ["s3://b/k", None]}, "d": "plain"}
