"""Who may call the local Log Service: signatures of versions 1 and 4, STS tokens and clocks."""

import base64
import datetime
import hashlib
import hmac
from types import SimpleNamespace

import pytest
import requests
from aliyun.log import LogClient, LogException, auth
from aliyun.log.proto import LogGroup
from local_log_service import LocalLogService

pytestmark = pytest.mark.quick

PROJECT = "signed-project"
LOGSTORE = "target"
GROUP = LogGroup(Topic="nginx", Source="10.0.0.1")
VERSIONS = pytest.mark.parametrize("version", [auth.AUTH_VERSION_1, auth.AUTH_VERSION_4])


@pytest.fixture(scope="module")
def log_service():
    keys = {"one": "the secret of one", "two": "the secret of two", "sts": "the secret of sts"}
    with LocalLogService(access_keys=keys, security_tokens={"sts": "the token"}) as running:
        running.create_logstore(PROJECT, LOGSTORE)
        yield running


def client_of(service, version, key_id="one", secret=None, token=None, region=None):
    client = LogClient(
        service.endpoint,
        key_id,
        secret or service.access_keys.get(key_id, "a secret"),
        token,
        source="10.0.0.1",
        auth_version=version,
        region=region or service.region,
    )
    client._session.trust_env = False
    client._session.proxies = {"http": service.environment()["http_proxy"]}
    return client


def refusal(call, *arguments, **named):
    with pytest.raises(LogException) as raised:
        call(*arguments, **named)
    assert "secret" not in raised.value.get_error_message()
    return raised.value.get_resp_status(), raised.value.get_error_code()


def unauthorized(call, *arguments):
    """The message of a refusal that is Unauthorized."""
    with pytest.raises(LogException) as raised:
        call(*arguments)
    assert (raised.value.get_resp_status(), raised.value.get_error_code()) == (401, "Unauthorized")
    return raised.value.get_error_message()


def signed_put(service, version):
    """What the SDK would send for a put, signed."""
    client = client_of(service, version)
    sent = []
    client._sendRequest = lambda *request: sent.append(request) or (None, {})
    client.put_log_raw(PROJECT, LOGSTORE, GROUP)
    method, url, params, body, headers, _ = sent[0]
    return SimpleNamespace(method=method, url=url, params=params, body=body, headers=headers)


def send(service, request):
    """Send a request as it is and return (status, code of the error or None)."""
    response = requests.request(
        request.method,
        request.url,
        params=request.params,
        data=request.body,
        headers=request.headers,
        proxies={"http": service.environment()["http_proxy"]},
    )
    assert "secret" not in response.text
    return response.status_code, None if response.status_code == 200 else response.json()["errorCode"]


@VERSIONS
def test_every_kind_of_request_is_accepted_when_signed_rightly(log_service, version):
    client = client_of(log_service, version)
    client.put_log_raw(PROJECT, LOGSTORE, GROUP)
    cursor = client.get_begin_cursor(PROJECT, LOGSTORE, 0).get_cursor()
    assert client.pull_logs(PROJECT, LOGSTORE, 0, cursor).get_loggroup_count() >= 1
    client.get_previous_cursor_time(PROJECT, LOGSTORE, 0, cursor)  # its parameter has a line feed in it
    client.create_consumer_group(PROJECT, LOGSTORE, "group-" + version, 10)
    client.heart_beat(PROJECT, LOGSTORE, "group-" + version, "consumer", [])
    client.update_check_point(PROJECT, LOGSTORE, "group-" + version, 0, cursor, "consumer")
    client.update_consumer_group(PROJECT, LOGSTORE, "group-" + version, 20)
    client.delete_consumer_group(PROJECT, LOGSTORE, "group-" + version)
    client.list_logstore(PROJECT, "täglich & ~more/?=")  # what has to be percent-encoded
    assert refusal(client.list_shards, PROJECT, "ünknown") == (404, "LogStoreNotExist")


def test_requests_sent_straight_to_the_service_are_accepted(log_service):
    request = signed_put(log_service, auth.AUTH_VERSION_1)
    request.url = log_service.environment()["http_proxy"] + request.url[len(log_service.endpoint) + len(PROJECT) + 4 :]
    response = requests.post(request.url, data=request.body, headers=request.headers, proxies={"http": ""})
    assert response.status_code == 200


@VERSIONS
def test_a_wrong_secret_is_refused(log_service, version):
    client = client_of(log_service, version, secret="another secret")
    assert refusal(client.list_shards, PROJECT, LOGSTORE) == (401, "SignatureNotMatch")
    client = client_of(log_service, version, "one", log_service.access_keys["two"])
    assert refusal(client.put_log_raw, PROJECT, LOGSTORE, GROUP) == (401, "SignatureNotMatch")


@VERSIONS
def test_an_unknown_key_is_refused(log_service, version):
    client = client_of(log_service, version, "nobody")
    assert unauthorized(client.list_shards, PROJECT, LOGSTORE) == "AccessKeyId not found: nobody"
    assert unauthorized(client.list_shards, "no-project", LOGSTORE) == "AccessKeyId not found: nobody"
    assert unauthorized(client.list_machine_group, PROJECT) == "AccessKeyId not found: nobody"


@VERSIONS
def test_a_malformed_key_is_refused(log_service, version):
    client = client_of(log_service, version, "no key")
    assert refusal(client.list_shards, PROJECT, LOGSTORE) == (401, "InvalidAccessKeyId")


@VERSIONS
def test_a_disabled_key_is_refused(log_service, version):
    client = client_of(log_service, version, "two")
    log_service.disabled_keys.add("two")
    assert unauthorized(client.list_shards, PROJECT, LOGSTORE) == "AccessKeyId is disabled: two"
    client_of(log_service, version).list_shards(PROJECT, LOGSTORE)
    log_service.disabled_keys.remove("two")
    client.list_shards(PROJECT, LOGSTORE)


@VERSIONS
def test_an_account_in_arrears_is_refused(log_service, version):
    client = client_of(log_service, version)
    log_service.in_arrears = True
    assert unauthorized(client.list_shards, PROJECT, LOGSTORE) == "Your SLS service has been forbidden"
    log_service.in_arrears = False
    client.list_shards(PROJECT, LOGSTORE)


@VERSIONS
def test_a_security_token_ends(log_service, version):
    client = client_of(log_service, version, "sts", token="the token")
    log_service.token_ends["sts"] = datetime.datetime.now().timestamp() + 1000
    client.list_shards(PROJECT, LOGSTORE)
    log_service.token_ends["sts"] -= 1001
    assert unauthorized(client.list_shards, PROJECT, LOGSTORE) == "The security token you provided has expired"
    del log_service.token_ends["sts"]
    client.list_shards(PROJECT, LOGSTORE)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Basic b25lOnNlY3JldA==",
        "LOG",
        "LOG one",
        "LOG one:",
        "LOG one:ü",
        b"LOG one:\xff",
        "SLS4-HMAC-SHA256 ",
    ],
)
def test_a_request_without_a_proper_signature_is_refused(log_service, authorization):
    request = signed_put(log_service, auth.AUTH_VERSION_1)
    if isinstance(authorization, str):
        authorization = authorization.encode("utf-8")
    request.headers["Authorization"] = authorization
    status, code = send(log_service, request)
    assert status == 401
    assert code in ("Unauthorized", "InvalidAccessKeyId", "SignatureNotMatch")


def test_no_authorization_is_unauthorized(log_service):
    request = signed_put(log_service, auth.AUTH_VERSION_1)
    del request.headers["Authorization"]
    assert send(log_service, request) == (401, "Unauthorized")


def test_a_key_can_be_revoked_and_reinstated_while_the_service_runs(log_service):
    client = client_of(log_service, auth.AUTH_VERSION_1, "two")
    client.list_shards(PROJECT, LOGSTORE)
    secret = log_service.access_keys.pop("two")
    assert refusal(client.list_shards, PROJECT, LOGSTORE) == (401, "Unauthorized")
    log_service.access_keys["two"] = "changed secret"
    assert refusal(client.list_shards, PROJECT, LOGSTORE) == (401, "SignatureNotMatch")
    log_service.access_keys = {**log_service.access_keys, "two": secret}
    client.list_shards(PROJECT, LOGSTORE)


def change_method(request):
    request.method = "PUT"


def change_path(request):
    request.url = request.url.replace("shards/lb", "shards/0")


def change_query(request):
    request.params = {"key": "0" * 32}


def change_project(request):
    request.url = request.url.replace(PROJECT, "other-project")
    request.headers["Host"] = request.headers["Host"].replace(PROJECT, "other-project")


def change_size(request):
    request.headers["x-log-bodyrawsize"] = "1"


def add_header(request):
    request.headers["x-log-something"] = b"\xff"


def drop_header(request):
    del request.headers["x-log-compresstype"]


def change_content_type(request):
    request.headers["Content-Type"] = "application/json"


@VERSIONS
@pytest.mark.parametrize(
    "change", [change_method, change_path, change_query, change_size, add_header, drop_header, change_content_type]
)
def test_a_request_that_was_changed_on_the_way_is_refused(log_service, version, change):
    request = signed_put(log_service, version)
    assert send(log_service, request) == (200, None)
    taken = len(log_service.ledger(PROJECT, LOGSTORE))
    change(request)
    assert send(log_service, request) == (401, "SignatureNotMatch")
    assert len(log_service.ledger(PROJECT, LOGSTORE)) == taken


def sign_with(request, method, algorithm):
    """Sign a request of version 1 anew, which the SDK does with SHA-1 alone."""
    request.headers["x-log-signaturemethod"] = method
    headers = {name.lower(): text for name, text in request.headers.items()}
    lines = [request.method, headers["content-md5"], headers["content-type"], headers["date"]]
    lines += ["%s:%s" % (name, headers[name]) for name in sorted(headers) if name.startswith("x-log-")]
    lines.append(request.url[request.url.index("/logstores") :])
    digest = hmac.new(b"the secret of one", "\n".join(lines).encode(), algorithm).digest()
    request.headers["Authorization"] = "LOG one:" + base64.b64encode(digest).decode()


@pytest.mark.parametrize("method, algorithm", [("hmac-sha1", hashlib.sha1), ("hmac-sha256", hashlib.sha256)])
def test_version_1_is_signed_with_sha_1_or_sha_256(log_service, method, algorithm):
    request = signed_put(log_service, auth.AUTH_VERSION_1)
    del request.headers["x-log-date"]
    sign_with(request, method, algorithm)
    assert send(log_service, request) == (200, None)
    request.headers["x-log-signaturemethod"] = {"hmac-sha1": "hmac-sha256", "hmac-sha256": "hmac-sha1"}[method]
    assert send(log_service, request) == (401, "SignatureNotMatch")


def test_an_empty_content_md5_stands_for_no_body(log_service):
    """What the OpenAPI SDKs send where there is none, by GET and by POST, signed with hmac-sha256."""
    request = signed_put(log_service, auth.AUTH_VERSION_1)
    del request.headers["x-log-date"]
    request.headers.update({"Content-MD5": "", "Content-Type": "application/json", "x-log-bodyrawsize": "0"})
    sign_with(request, "hmac-sha256", hashlib.sha256)
    assert send(log_service, request) == (400, "PostBodyInvalid")
    request.method, request.body = "GET", b""
    request.headers.pop("Content-Length", None)
    request.url = request.url[: request.url.rindex("/")]
    sign_with(request, "hmac-sha256", hashlib.sha256)
    assert send(log_service, request) == (200, None)


def test_other_signature_methods_are_refused(log_service):
    request = signed_put(log_service, auth.AUTH_VERSION_1)
    request.headers["x-log-signaturemethod"] = "hmac-md5"
    assert send(log_service, request) == (400, "InvalidSignatureMethod")
    del request.headers["x-log-signaturemethod"]
    assert send(log_service, request) == (400, "MissingSignatureMethod")


def test_version_4_signs_the_host_too(log_service):
    request = signed_put(log_service, auth.AUTH_VERSION_4)
    change_project(request)
    assert send(log_service, request) == (401, "SignatureNotMatch")


@VERSIONS
def test_a_body_that_was_changed_on_the_way_is_refused(log_service, version):
    request = signed_put(log_service, version)
    request.body = request.body[:-1] + bytes([request.body[-1] ^ 1])
    assert send(log_service, request) == (400, "PostBodyInvalid")
    digest = "Content-MD5" if version == auth.AUTH_VERSION_1 else "x-log-content-sha256"
    request.headers[digest] = "0" * len(request.headers[digest])
    assert send(log_service, request) == (401, "SignatureNotMatch")


def test_version_4_names_the_region(log_service):
    client = client_of(log_service, auth.AUTH_VERSION_4, region="elsewhere")
    with pytest.raises(LogException, match=r"SignatureNotMatch.*region"):
        client.list_shards(PROJECT, LOGSTORE)


@VERSIONS
def test_a_key_with_a_security_token_needs_it(log_service, version):
    client_of(log_service, version, "sts", token="the token").list_shards(PROJECT, LOGSTORE)
    for key_id, token in (("sts", None), ("sts", "another token"), ("one", "the token")):
        client = client_of(log_service, version, key_id, token=token)
        assert refusal(client.list_shards, PROJECT, LOGSTORE) == (401, "Unauthorized")
    client = log_service.client("sts")
    client.list_shards(PROJECT, LOGSTORE)


@VERSIONS
@pytest.mark.parametrize("minutes, accepted", [(-16, False), (-14, True), (14, True), (16, False)])
def test_a_clock_may_be_off_by_15_minutes(log_service, version, minutes, accepted, monkeypatch):
    client = client_of(log_service, version)

    class SkewedClock(datetime.datetime):
        @classmethod
        def utcnow(cls):
            return datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=minutes)

    monkeypatch.setattr(auth, "datetime", SkewedClock)
    if accepted:
        client.list_shards(PROJECT, LOGSTORE)
    else:
        assert refusal(client.list_shards, PROJECT, LOGSTORE) == (400, "RequestTimeExpired")


@pytest.mark.parametrize("version, header", [(auth.AUTH_VERSION_1, "Date"), (auth.AUTH_VERSION_4, "x-log-date")])
def test_a_request_without_a_proper_time_is_refused(log_service, version, header):
    request = signed_put(log_service, version)
    for time in ("yesterday", "Mon, 99 Jan 2006 15:04:05 GMT", "Mon, 02 Jan 99999 15:04:05 GMT", "20060199T150405Z"):
        request.headers[header] = time
        assert send(log_service, request) == (400, "InvalidRequestTime")
    del request.headers[header]
    if version == auth.AUTH_VERSION_4:
        assert send(log_service, request) == (400, "InvalidRequestTime")
    else:
        assert send(log_service, request) == (200, None)  # x-log-date stands in for it
