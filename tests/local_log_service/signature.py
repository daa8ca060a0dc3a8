"""Verification of request signatures, versions 1 and 4, from the vendor's "Request signatures".

Everything is computed anew from the request as it arrived and compared in constant time.
"""

import base64
import calendar
import datetime
import email.utils
import functools
import hashlib
import hmac
import math
import re
import time
from typing import Any, Callable, Container, Mapping, NamedTuple, Tuple
from urllib.parse import quote

from .errors import ServiceError

#: How far the clock of a client may be off, in seconds.
MAXIMUM_CLOCK_SKEW = 15 * 60

_V1 = "LOG "
_V4 = "SLS4-HMAC-SHA256 "
_UNSIGNED_PREFIX = "x-log-meta-"
_DIGESTS = {"hmac-sha1": hashlib.sha1, "hmac-sha256": hashlib.sha256}  # of version 1
_ACCESS_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Keys(NamedTuple):
    """Who may call.

    Attributes:
        access_keys: access key id -> secret.
        disabled: ids of access keys that are disabled.
        security_tokens: access key id -> STS token that has to come with it.
        token_ends: access key id -> unix time at which its STS token expires; those that are missing never do.
        forbidden: whether the account is in arrears, so that nobody may.
    """

    access_keys: Mapping[str, str]
    disabled: Container[str]
    security_tokens: Mapping[str, str]
    token_ends: Mapping[str, float]
    forbidden: bool


def verify(
    method: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    body: bytes,
    keys: Keys,
    region: str,
    now: float,
) -> None:
    """Check that a request was signed by the owner of an access key, recently, and not changed since.

    Args:
        method: HTTP method.
        path: the path of the resource, not percent-encoded.
        query: the query parameters, not percent-encoded.
        headers: names in lower case.
        body: as sent, that is compressed.
        keys: who may call.
        region: what version 4 has to name.
        now: unix time in seconds.

    Raises:
        ServiceError: Unauthorized, InvalidAccessKeyId (malformed), SignatureNotMatch, MissingSignatureMethod,
            InvalidSignatureMethod, InvalidRequestTime, RequestTimeExpired or PostBodyInvalid (the body is not the one
            that was signed).
    """
    authorization = headers.get("authorization", "")
    if authorization.startswith(_V1):
        access_key_id, _, signature = authorization[len(_V1) :].rpartition(":")
        digest = _digest(headers.get("x-log-signaturemethod", ""))
        secret = _secret(access_key_id, headers, keys, now)
        _check_clock(_http_time(headers.get("date") or headers.get("x-log-date", "")), now)
        expected = _sign_v1(method, path, query, headers, secret, digest)
    elif authorization.startswith(_V4):
        access_key_id, scope, signature = _parse_v4(authorization[len(_V4) :])
        secret = _secret(access_key_id, headers, keys, now)
        request_time = headers.get("x-log-date", "")
        _check_clock(_compact_time(request_time), now)
        if scope != "{}/{}/sls/aliyun_v4_request".format(request_time[:8], region):
            raise ServiceError("SignatureNotMatch", "the scope of the signature is not that of this region")
        expected = _sign_v4(method, path, query, headers, secret, region, scope)
    else:
        raise ServiceError("Unauthorized", "the request bears no signature")
    if not hmac.compare_digest(_bytes(signature), _bytes(expected)):
        raise ServiceError("SignatureNotMatch", "Signature {} not matched".format(signature))
    _check_body(headers, body)


def _bytes(text: str) -> bytes:
    """Return what a client sent for ``text``: headers may hold any bytes, and those that are no UTF-8 are escaped."""
    return text.encode("utf-8", "surrogateescape")


def _digest(method: str) -> Callable[..., Any]:
    """Return the hash function of a signature method of version 1."""
    if not method:
        raise ServiceError("MissingSignatureMethod")
    if method not in _DIGESTS:
        raise ServiceError("InvalidSignatureMethod", "signature method {} is unsupported".format(method))
    return _DIGESTS[method]


def _secret(access_key_id: str, headers: Mapping[str, str], keys: Keys, now: float) -> str:
    """Return the secret of a key that may call, and whose STS token, if it has one, is with the request."""
    if not _ACCESS_KEY_ID.fullmatch(access_key_id):
        raise ServiceError("InvalidAccessKeyId", "The access key id you provided is invalid: {}".format(access_key_id))
    secret = keys.access_keys.get(access_key_id)
    if secret is None:
        raise ServiceError("Unauthorized", "AccessKeyId not found: {}".format(access_key_id))
    if access_key_id in keys.disabled:
        raise ServiceError("Unauthorized", "AccessKeyId is disabled: {}".format(access_key_id))
    sent = headers.get("x-acs-security-token", "")
    required = keys.security_tokens.get(access_key_id, "")
    if not hmac.compare_digest(_bytes(sent), _bytes(required)):
        raise ServiceError("Unauthorized", "The security token you provided is invalid")
    if now >= keys.token_ends.get(access_key_id, math.inf):
        raise ServiceError("Unauthorized", "The security token you provided has expired")
    if keys.forbidden:
        raise ServiceError("Unauthorized", "Your SLS service has been forbidden")
    return secret


def _check_clock(request_time: float, now: float) -> None:
    if abs(now - request_time) > MAXIMUM_CLOCK_SKEW:
        raise ServiceError(
            "RequestTimeExpired",
            "Request time {} has been expired while server time is {}".format(int(request_time), int(now)),
        )


def _check_body(headers: Mapping[str, str], body: bytes) -> None:
    """Check the body against the digests that were signed; version 4 always has one.

    The OpenAPI SDKs send an empty Content-MD5 where there is no body.
    """
    for name, algorithm in (("content-md5", hashlib.md5), ("x-log-content-sha256", hashlib.sha256)):
        expected = algorithm(body).hexdigest() if body or headers.get(name) else ""
        if headers.get(name, expected).lower() != expected:
            raise ServiceError("PostBodyInvalid", "the body does not have the {} that was signed".format(name))


@functools.lru_cache(maxsize=64)  # clients send the same second many times
def _http_time(text: str) -> float:
    """Return the unix time of an HTTP date, "Mon, 02 Jan 2006 15:04:05 GMT"."""
    try:
        return email.utils.parsedate_to_datetime(text).replace(tzinfo=datetime.timezone.utc).timestamp()
    except (TypeError, ValueError):  # which of them depends on the release of Python
        raise ServiceError("InvalidRequestTime", "Request time {} not follow RFC822 spec".format(text))


@functools.lru_cache(maxsize=64)
def _compact_time(text: str) -> float:
    """Return the unix time of a "20060102T150405Z"."""
    try:
        return calendar.timegm(time.strptime(text, "%Y%m%dT%H%M%SZ"))
    except ValueError:
        raise ServiceError("InvalidRequestTime", "Request time {} is not of the form of version 4".format(text))


def _is_signed_header(name: str) -> bool:
    return name.startswith("x-acs-") or (name.startswith("x-log-") and not name.startswith(_UNSIGNED_PREFIX))


def _sign_v1(
    method: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    secret: str,
    algorithm: Callable[..., Any],
) -> str:
    lines = [
        method,
        headers.get("content-md5", ""),
        headers.get("content-type", ""),
        headers.get("date") or headers.get("x-log-date", ""),
    ]
    # x-log-date is a copy of Date which clients add once they have signed.
    lines.extend(
        name + ":" + headers[name] for name in sorted(headers) if _is_signed_header(name) and name != "x-log-date"
    )
    resource = path
    if query:
        resource += "?" + "&".join(name + "=" + value for name, value in sorted(query.items()))
    lines.append(resource)
    digest = hmac.new(secret.encode("utf-8"), _bytes("\n".join(lines)), algorithm).digest()
    return base64.b64encode(digest).decode("ascii")


def _parse_v4(fields: str) -> Tuple[str, str, str]:
    """Return (access key id, scope, signature) of "Credential=<id>/<scope>,Signature=<hex>"."""
    named = dict(field.strip().partition("=")[::2] for field in fields.split(","))
    access_key_id, _, scope = named.get("Credential", "").partition("/")
    return access_key_id, scope, named.get("Signature", "")


@functools.lru_cache(maxsize=64)
def _signing_key(secret: str, date: str, region: str) -> bytes:
    key = ("aliyun_v4" + secret).encode("utf-8")
    for part in (date, region, "sls", "aliyun_v4_request"):
        key = hmac.new(key, part.encode("utf-8"), hashlib.sha256).digest()
    return key


def _sign_v4(
    method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], secret: str, region: str, scope: str
) -> str:
    signed = sorted(name for name in headers if name in ("content-type", "host") or _is_signed_header(name))
    parameters = sorted((name, quote(value, safe="~")) for name, value in query.items())
    canonical_request = "\n".join(
        [
            method,
            path,
            "&".join(name + "=" + value if value else name for name, value in parameters),
            "".join(name + ":" + headers[name].strip() + "\n" for name in signed),
            ";".join(signed),
            headers.get("x-log-content-sha256", hashlib.sha256().hexdigest()),
        ]
    )
    request_time = headers["x-log-date"]
    text = "\n".join([_V4.strip(), request_time, scope, hashlib.sha256(_bytes(canonical_request)).hexdigest()])
    key = _signing_key(secret, request_time[:8], region)
    return hmac.new(key, _bytes(text), hashlib.sha256).hexdigest()
