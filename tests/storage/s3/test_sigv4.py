from __future__ import annotations

import calendar
import time
from typing import Any

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.storage.s3.sigv4 import UNSIGNED_PAYLOAD, SigningKeys, encode_key, encode_query, sign

_characters = st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")
_keys = st.text(_characters, min_size=1, max_size=30)
_queries = st.dictionaries(st.text(_characters, min_size=1, max_size=8), st.text(_characters, max_size=12), max_size=4)
_values = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20).map(str.strip)
_headers = st.dictionaries(st.from_regex(r"x-amz-[a-z][a-z-]{0,10}", fullmatch=True), _values.filter(bool), max_size=4)


class _Signer(S3SigV4Auth):  # type: ignore[misc]
    payload_hash = ""

    def payload(self, request: Any) -> str:
        return self.payload_hash


@settings(max_examples=150)
@given(
    method=st.sampled_from(["GET", "PUT", "POST", "DELETE", "HEAD"]),
    key=_keys,
    query=_queries,
    headers=_headers,
    token=st.none() | st.from_regex(r"[A-Za-z0-9+/=]{1,60}", fullmatch=True),
    secret=st.from_regex(r"[A-Za-z0-9+/]{1,40}", fullmatch=True),
    payload_hash=st.sampled_from([UNSIGNED_PAYLOAD, "0" * 64]),
)
def test_our_signature_is_botocores(
    method: str,
    key: str,
    query: dict[str, str],
    headers: dict[str, str],
    token: str | None,
    secret: str,
    payload_hash: str,
) -> None:
    path, encoded_query = "/bucket/" + encode_key(key), encode_query(query.items())
    url = f"https://host.example:9000{path}" + (f"?{encoded_query}" if encoded_query else "")
    request = AWSRequest(method=method, url=url, headers={**headers, "range": "bytes=0-1"})
    signer = _Signer(Credentials("AKID", secret, token), "s3", "eu-west-1")
    signer.payload_hash = payload_hash
    signer.add_auth(request)
    stamp = request.context["timestamp"]
    ours = sign(
        method,
        path,
        encoded_query,
        {"host": "host.example:9000", "range": "bytes=0-1", **headers},
        payload_hash,
        SigningKeys(access_key_id="AKID", secret_access_key=secret, session_token=token),
        "eu-west-1",
        calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ")) * 1_000_000,
    )
    assert ours["authorization"] == request.headers["Authorization"]
    assert ours["x-amz-date"] == stamp
    assert ours.get("x-amz-security-token") == token


def test_keys_show_no_secret() -> None:
    shown = repr(SigningKeys(access_key_id="AKID", secret_access_key="hush", session_token="hush"))
    assert "hush" not in shown
