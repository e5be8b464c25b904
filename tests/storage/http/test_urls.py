"""URLs of the web: what is asked for is what was given, byte for byte where that is possible."""

from __future__ import annotations

import pytest

from icechunk.errors import InvalidInputError
from icechunk.storage.http.urls import joined, parse_url


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://h", "/"),
        ("http://h/a/b.nc", "/a/b.nc"),
        ("http://h/a%2Fb%41", "/a%2Fb%41"),
        ("http://h/a b\u00e4%zz%", "/a%20b%C3%A4%25zz%25"),
        ("http://h/a?b=%41%2f+c&d='\"<>|~", "/a?b=%41%2f+c&d='\"<>|~"),
        ("http://h/a?b c\u00e4", "/a?b%20c%C3%A4"),
        ("http://h/a?", "/a?"),
        ("http://h?x=1", "/?x=1"),
        ("http://h/a?x#fragment", "/a?x"),
        ("http://h/..%5C", "/..%5C"),
        ("http://h/a\\b", "/a%5Cb"),
    ],
)
def test_the_path_keeps_its_encodings_and_the_query_every_byte(url: str, target: str) -> None:
    assert parse_url(url).target == target


@pytest.mark.parametrize(
    ("url", "host", "port", "header"),
    [
        ("HTTP://Example.COM/x", "example.com", 80, "example.com"),
        ("https://h:443/x", "h", 443, "h"),
        ("http://h:8080/x", "h", 8080, "h:8080"),
        ("http://[::1]:80/x", "::1", 80, "[::1]"),
        ("http://b\u00fccher.example/", "xn--bcher-kva.example", 80, "xn--bcher-kva.example"),
    ],
)
def test_hosts_and_ports(url: str, host: str, port: int, header: str) -> None:
    parsed = parse_url(url)
    assert (parsed.host, parsed.port, parsed.host_header) == (host, port, header)


def test_a_user_in_the_url_becomes_a_header_and_is_not_sent_with_it() -> None:
    parsed = parse_url("http://me:p%40ss@h/x")
    assert parsed.authorization == "Basic bWU6cEBzcw=="
    assert str(parsed) == "http://h/x"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/x", "h/x", "http://", "http:///x", "http://h:99999/", "http://h:x/", "http://a b/", "http://h\\@evil/",
        "http://h/\t../x", "http://h/\nx", "http://h\r/", "http://h/\0", "http://h/\x7f", "http://h/\udc80", " http://h/",
        "http://[h]/x", "http://h%41/x",
    ],
)  # fmt: skip
def test_urls_that_are_not_http_are_refused(url: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_url(url)
    assert caught.value.kind == "cannot-parse-url"


@pytest.mark.parametrize("location", ["http://[x/", "/a\tb", "http://h/\0"])
def test_redirects_that_lead_nowhere_are_refused(location: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        joined(parse_url("http://h/x"), location)
    assert caught.value.kind == "bad-redirect"
    assert joined(parse_url("http://h/a/x?q"), "../y?z") == "http://h/y?z"
