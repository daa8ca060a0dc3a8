"""The metadata service, STS and the agent that the local service's keys come from: what they ask for and answer."""

import json
import ssl
import time
import urllib.error
import urllib.request
from urllib.parse import urlencode

import pytest
from aliyun.log import LogException
from aliyun.log.credentials import StaticCredentialsProvider
from local_log_service import LocalLogService
from local_log_service.key_services import Answer, KeyServices

pytestmark = pytest.mark.quick

PROJECT = "test-project"


@pytest.fixture
def service():
    with LocalLogService() as running:
        running.create_logstore(PROJECT, "logs")
        yield running


@pytest.fixture
def key_services(service):
    with KeyServices(service) as running:
        yield running


def request(url, method="GET", headers=None, data=None, handlers=()):
    """(status, text) of the answer; never through a proxy but that among the handlers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), *handlers)
    try:
        with opener.open(urllib.request.Request(url, data, headers or {}, method=method)) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def may_call(service, key):
    """What the service says to a call with this key."""
    client = service.client()
    client._auth.credentials_provider = StaticCredentialsProvider(
        key["AccessKeyId"], key["AccessKeySecret"], key["SecurityToken"]
    )
    try:
        client.list_shards(PROJECT, "logs")
    except LogException as error:
        return error.get_error_message()
    return "welcome"


# ---- keys


def test_a_key_is_good_until_its_end_and_forgotten_then(service, key_services):
    key = key_services.new_key("test")
    assert may_call(service, key) == "welcome"
    assert may_call(service, dict(key, SecurityToken="another")) == "The security token you provided is invalid"
    dead = key_services.new_key("test", life=0.0)
    assert may_call(service, dead) == "The security token you provided has expired"
    service.wait_for(lambda: key_services.new_key("test") and dead["AccessKeyId"] not in service.access_keys)
    assert may_call(service, dead) == "AccessKeyId not found: " + dead["AccessKeyId"]
    assert may_call(service, key) == "welcome"
    key_services.revoke()
    assert "not found" in may_call(service, key)


# ---- the metadata service


ROLES = "meta-data/ram/security-credentials/"


def metadata_token(key_services, ttl="21600"):
    headers = {"X-aliyun-ecs-metadata-token-ttl-seconds": ttl} if ttl else {}
    return request(key_services.metadata + "api/token", "PUT", headers)


@pytest.mark.parametrize("is_hardened", [True, False])
def test_metadata_in_both_forms(service, key_services, is_hardened):
    headers = {"X-aliyun-ecs-metadata-token": metadata_token(key_services)[1]} if is_hardened else {}
    status, role = request(key_services.metadata + ROLES, headers=headers)
    assert (status, role) == (200, "dispatch-data")
    key = json.loads(request(key_services.metadata + ROLES + role, headers=headers)[1])
    assert key["Code"] == "Success" and may_call(service, key) == "welcome"
    again = json.loads(request(key_services.metadata + ROLES + role, headers=headers)[1])
    assert again == key, "the same until it is renewed"
    assert request(key_services.metadata + ROLES + "another", headers=headers)[0] == 404


def test_metadata_refuses(key_services):
    assert metadata_token(key_services, ttl="")[0] == 400
    assert metadata_token(key_services, ttl="21601")[0] == 400
    url = key_services.metadata + ROLES
    assert request(url, headers={"X-aliyun-ecs-metadata-token": "wrong"})[0] == 401
    key_services.wants_hardened_form = True
    assert request(url)[0] == 403
    key_services.wants_hardened_form, key_services.role = False, ""
    assert request(url)[0] == 404
    key_services.has_hardened_form = False
    assert metadata_token(key_services)[0] == 404


def test_metadata_notices_a_proxy(key_services):
    proxy = urllib.request.ProxyHandler({"http": "http://127.0.0.1:%d" % key_services.port})
    assert request("http://100.100.100.200/latest/" + ROLES, handlers=[proxy])[0] == 502
    assert len(key_services.through_proxy) == 1


# ---- the agent


def test_the_agent(service, key_services):
    status, text = request(key_services.agent)
    assert status == 200 and may_call(service, json.loads(text)) == "welcome"
    plain = key_services.agent
    key_services.password = "secret"
    assert request(plain)[0] == 401
    assert request(plain, headers={"Authorization": "Basic YWdlbnQ6c2VjcmV0"})[0] == 200
    key_services.ordered["GET", "/agent"] = Answer(503, "later")
    assert request(plain) == (503, "later")


# ---- STS


def assume_role(key_services, **changes):
    """(status, text) of AssumeRoleWithOIDC; the vendor's libraries send the first few parameters in the query."""
    query = {"Action": "AssumeRoleWithOIDC", "Version": "2015-04-01", "Format": "JSON"}
    form = {
        "RoleArn": key_services.role_arn,
        "OIDCProviderArn": key_services.provider_arn,
        "OIDCToken": next(iter(key_services.oidc_tokens)),
        "RoleSessionName": "test",
        "DurationSeconds": "3600",
    }
    for name, text in changes.items():
        (query if name in query else form)[name] = text
    environment = key_services.environment()
    trusting = ssl.create_default_context(cafile=environment["REQUESTS_CA_BUNDLE"])
    handlers = [
        urllib.request.ProxyHandler({"https": environment["https_proxy"]}),
        urllib.request.HTTPSHandler(context=trusting),
    ]
    body = urlencode({name: text for name, text in form.items() if text}).encode()
    return request("https://sts.aliyuncs.com/?" + urlencode(query), "POST", data=body, handlers=handlers)


def test_sts_gives_a_key(service, key_services):
    status, text = assume_role(key_services)
    answer = json.loads(text)
    key = answer["Credentials"]
    assert status == 200 and set(key) == {"AccessKeyId", "AccessKeySecret", "SecurityToken", "Expiration"}
    assert answer["AssumedRoleUser"]["Arn"] == "acs:ram::1234567890123456:assumed-role/dispatch-data/test"
    assert may_call(service, key) == "welcome"
    end = time.mktime(time.strptime(key["Expiration"], "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
    assert 3500 < end - time.time() <= 3600


REFUSALS = [
    (dict(Action="AssumeRole"), 404, "InvalidAction.NotFound"),
    (dict(Version="2014-01-01"), 404, "InvalidAction.NotFound"),
    (dict(OIDCToken=""), 400, "MissingOIDCToken"),
    (dict(RoleArn=""), 400, "MissingRoleArn"),
    (dict(RoleSessionName="a b"), 400, "InvalidParameter.RoleSessionName"),
    (dict(DurationSeconds="60"), 400, "InvalidParameter.DurationSeconds"),
    (dict(OIDCProviderArn="acs:ram::1:oidc-provider/x"), 400, "AuthenticationFail.NoPermission"),
    (dict(OIDCToken="another"), 400, "AuthenticationFail.OIDCToken.Expired"),
    (dict(RoleArn="acs:ram::1:role/x"), 404, "EntityNotExist.Role"),
]


@pytest.mark.parametrize("changes, status, code", REFUSALS)
def test_sts_refuses(key_services, changes, status, code):
    answered, text = assume_role(key_services, **changes)
    assert (answered, json.loads(text)["Code"]) == (status, code)
    answered, text = assume_role(key_services, Format="XML", **changes)
    assert answered == status and "<Error><RequestId>" in text and "<Code>%s</Code>" % code in text
    assert key_services.given_out["STS"] == 0


def test_sts_whose_role_does_not_trust(key_services):
    key_services.trusts = False
    assert "AuthenticationFail.NoPermission" in assume_role(key_services)[1]
    key_services.role_exists = False
    assert "EntityNotExist.Role" in assume_role(key_services)[1]


# ---- outages


def test_they_listen_on_the_same_port_after_an_outage(key_services):
    port = key_services.port
    key_services.stop()
    with pytest.raises(urllib.error.URLError):
        request(key_services.agent)
    key_services.start()
    assert key_services.port == port and request(key_services.agent)[0] == 200
