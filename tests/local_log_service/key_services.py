"""Those who hand out keys that end: the metadata service of an ECS instance, STS, and a local agent.

They play on one port of the loopback interface. The metadata service and the agent are asked directly; STS is reached
by taking that port for the proxy of HTTPS, as a program does that is told so by ``https_proxy``. What they hand out are
keys of a ``LocalLogService``, which takes them until they end and forgets them then.

Held against the vendor's documentation of instance metadata, of RRSA and of AssumeRoleWithOIDC, and against its
credentials libraries for Python and Go: forms, parameters, fields and the codes EntityNotExist.Role,
AuthenticationFail.NoPermission and AuthenticationFail.OIDCToken.*. The codes for parameters that are missing or out of
range are guesses.
"""

import base64
import http.server
import json
import os
import re
import secrets
import ssl
import tempfile
import threading
import time
from collections import Counter
from typing import Dict, List, NamedTuple, Optional, Tuple
from urllib.parse import parse_qsl, urlsplit

from .service import LocalLogService

_HOST = "127.0.0.1"
_ROLES = "/latest/meta-data/ram/security-credentials/"
_LEFT_WHEN_RENEWED = 0.4  # of a key's life: the metadata service and the agent give the same key until then
_STS_PARAMETERS = ("RoleArn", "OIDCProviderArn", "OIDCToken", "RoleSessionName")


class Answer(NamedTuple):
    """An answer to order in the place of the right one."""

    status: int
    body: str = ""
    headers: Dict[str, str] = {}


class KeyServices:
    """Hands out keys of a service. Use it as a context manager, or call ``start`` and ``stop``.

    Started again after ``stop`` it listens on the same port and goes on, as after an outage.

    Attributes:
        life: seconds that a key lives; as all that follows, it may be changed at any time.
        role: the role of the instance, "" when none is attached.
        has_hardened_form: whether the metadata service gives tokens at all.
        wants_hardened_form: whether it answers nobody who has none.
        trusts: whether the trust policy of STS's role lets this service account assume it.
        role_exists: whether STS's role exists.
        oidc_tokens: the tokens of the service account that STS takes.
        password: what the agent asks for, of a user called "agent"; "" lets everybody in.
        ordered: (method, beginning of the path) -> what is answered instead; the path of STS is "/".
        given_out: how many keys each has given out: "metadata", "agent", "STS", and "file" for ``write_key``.
        asked: how often each was asked, in whatever way.
        through_proxy: requests that reached the metadata service or the agent by way of a proxy, which must not be.
        secrets: every secret and token that was ever given out or taken.
        port: where they listen; once started never 0.
    """

    role_arn = "acs:ram::1234567890123456:role/dispatch-data"
    provider_arn = "acs:ram::1234567890123456:oidc-provider/ack-rrsa-c0"

    def __init__(self, service: LocalLogService, life: float = 3600.0, port: int = 0) -> None:
        """Prepare to hand out keys of ``service`` that live ``life`` seconds; nothing listens yet."""
        self.service = service
        self.life = life
        self.role = "dispatch-data"
        self.has_hardened_form = self.trusts = self.role_exists = True
        self.wants_hardened_form = False
        self.oidc_tokens = {"oidc-token-" + secrets.token_hex(16)}
        self.password = ""
        self.ordered: Dict[Tuple[str, str], Answer] = {}
        self.given_out: Counter = Counter()
        self.asked: Counter = Counter()
        self.last_headers: Dict[str, Dict[str, str]] = {}
        self.through_proxy: List[str] = []
        self.secrets = set(self.oidc_tokens)
        self.port = port
        self._lock = threading.Lock()
        self._ends: Dict[str, float] = {}  # access key id -> unix time
        self._current: Dict[str, Dict[str, str]] = {}
        self._metadata_tokens: Dict[str, float] = {}
        self._server: Optional[_Server] = None
        self._directory = tempfile.TemporaryDirectory(prefix="key-services-")
        self._tls: Optional[ssl.SSLContext] = None

    def start(self) -> None:
        """Start to listen, in threads of this process. Raises OSError when the port is taken."""
        if self._tls is None:
            self._make_files()
        self._server = _Server((_HOST, self.port), _Handler)
        self._server.services = self
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening. Stopping twice does nothing more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def close(self) -> None:
        """Stop for good; the files of ``environment`` are gone."""
        self.stop()
        self._directory.cleanup()

    def __enter__(self) -> "KeyServices":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make_files(self) -> None:
        import trustme  # here, so that serving without keys needs nothing of it

        authority = trustme.CA(organization_name="Local STS")
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        names = ("sts.aliyuncs.com", "*.cn-hangzhou.aliyuncs.com", "*.cn-beijing.aliyuncs.com")
        authority.issue_cert(*names).configure_cert(self._tls)
        authority.cert_pem.write_to_path(self._path("authority.pem"))
        self.write_oidc_token(next(iter(self.oidc_tokens)))

    def _path(self, name: str) -> str:
        return os.path.join(self._directory.name, name)

    # How programs reach them

    @property
    def metadata(self) -> str:
        """What stands for ``http://100.100.100.200/latest/``."""
        return "http://{}:{}/latest/".format(_HOST, self.port)

    @property
    def agent(self) -> str:
        """The URL of the agent, with its password."""
        user = "agent:{}@".format(self.password) if self.password else ""
        return "http://{}{}:{}/agent/key".format(user, _HOST, self.port)

    def environment(self) -> Dict[str, str]:
        """Return the variables with which a program finds the agent and, with RRSA, STS."""
        proxy = "http://{}:{}".format(_HOST, self.port)
        return {
            "ALIBABA_CLOUD_CREDENTIALS_URI": self.agent,
            "ALIBABA_CLOUD_ROLE_ARN": self.role_arn,
            "ALIBABA_CLOUD_OIDC_PROVIDER_ARN": self.provider_arn,
            "ALIBABA_CLOUD_OIDC_TOKEN_FILE": self._path("token"),
            "REQUESTS_CA_BUNDLE": self._path("authority.pem"),
            "https_proxy": proxy,
            "HTTPS_PROXY": proxy,
        }

    def write_oidc_token(self, token: str) -> None:
        """Put a token where the pod finds that of its service account."""
        self.secrets.add(token)
        with open(self._path("token.new"), "w") as file:
            file.write(token + "\n")
        os.replace(self._path("token.new"), self._path("token"))

    def write_key(self, path: str, mode: int = 0o600) -> None:
        """Write a new key into a file, as a sidecar does that renews it."""
        unfinished = path + ".new"
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
            os.chmod(unfinished, mode)
            json.dump(self.new_key("file"), file)
        os.replace(unfinished, path)

    # Keys

    def new_key(self, giver: str, life: Optional[float] = None) -> Dict[str, str]:
        """Make a key that the service takes from now on; return it in the form of the metadata service."""
        now = time.time()
        end = int(now + (self.life if life is None else life))
        key = {
            "AccessKeyId": "STS." + secrets.token_hex(8),
            "AccessKeySecret": "secret/" + secrets.token_hex(16),
            "SecurityToken": "token+" + secrets.token_hex(32) + "==",
            "Expiration": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end)),
            "LastUpdated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
            "Code": "Success",
        }
        with self._lock:
            self._forget(now)
            self.given_out[giver] += 1
            self.secrets |= {key["AccessKeySecret"], key["SecurityToken"]}
            self._ends[key["AccessKeyId"]] = end
            self.service.token_ends[key["AccessKeyId"]] = end
            self.service.security_tokens[key["AccessKeyId"]] = key["SecurityToken"]
            self.service.access_keys[key["AccessKeyId"]] = key["AccessKeySecret"]
        return key

    def _forget(self, now: float) -> None:
        """Let the service forget the keys that ended a while ago; until then it says that they did."""
        for access_key_id, end in list(self._ends.items()):
            if now > end + 1:
                del self._ends[access_key_id]
                for known in (self.service.access_keys, self.service.security_tokens, self.service.token_ends):
                    known.pop(access_key_id, None)

    def revoke(self) -> None:
        """Let the service forget every key that was given out, though it has not ended."""
        with self._lock:
            self._current = {}
            self._ends = dict.fromkeys(self._ends, 0.0)
            self._forget(time.time())

    def _key_of(self, giver: str) -> Dict[str, str]:
        """Return the key of somebody who gives everybody the same, until it is to be renewed."""
        key = self._current.get(giver)
        if key is None or self._ends.get(key["AccessKeyId"], 0.0) - time.time() < self.life * _LEFT_WHEN_RENEWED:
            key = self._current[giver] = self.new_key(giver)
        return key

    # What they answer

    def answer(self, method: str, target: str, headers: Dict[str, str], body: str, is_sts: bool) -> Answer:
        """Return the answer to a request; ``headers`` by their names in lower case."""
        path = urlsplit(target).path
        giver = "STS" if is_sts else "agent" if path.startswith("/agent") else "metadata"
        self.asked[giver] += 1
        self.last_headers[giver] = headers
        for (ordered_method, beginning), answer in self.ordered.items():
            if method == ordered_method and path.startswith(beginning):
                return answer
        if is_sts:
            return self._sts(dict(parse_qsl(urlsplit(target).query)), dict(parse_qsl(body)), headers)
        if target.startswith("http://"):
            self.through_proxy.append(target)
            return Answer(502, "this must not be asked for through a proxy")
        return self._agent(path, headers) if giver == "agent" else self._metadata(method, path, headers)

    def _agent(self, path: str, headers: Dict[str, str]) -> Answer:
        wanted = "Basic " + base64.b64encode("agent:{}".format(self.password).encode()).decode()
        if self.password and headers.get("authorization") != wanted:
            return Answer(401, "who are you?")
        if path != "/agent/key":
            return Answer(404, "no such path")
        return Answer(200, json.dumps(self._key_of("agent")), {"Content-Type": "application/json"})

    def _metadata(self, method: str, path: str, headers: Dict[str, str]) -> Answer:
        not_found = Answer(404, "<html><head><title>404 Not Found</title></head></html>", {"Content-Type": "text/html"})
        if path == "/latest/api/token":
            if not self.has_hardened_form:
                return not_found
            ttl = headers.get("x-aliyun-ecs-metadata-token-ttl-seconds", "")
            if method != "PUT" or not re.fullmatch("[0-9]{1,5}", ttl) or not 1 <= int(ttl) <= 21600:
                return Answer(400, "bad request")
            token = secrets.token_hex(20)
            self.secrets.add(token)
            self._metadata_tokens[token] = time.time() + int(ttl)
            return Answer(200, token)
        token = headers.get("x-aliyun-ecs-metadata-token", "")
        if token and self._metadata_tokens.get(token, 0.0) < time.time():
            return Answer(401, "unauthorized")
        if not token and self.wants_hardened_form:
            return Answer(403, "forbidden")
        if method != "GET" or not self.role or path not in (_ROLES, _ROLES + self.role):
            return not_found
        if path == _ROLES:
            return Answer(200, self.role)
        return Answer(200, json.dumps(self._key_of("metadata")), {"Content-Type": "application/json"})

    def _sts(self, query: Dict[str, str], form: Dict[str, str], headers: Dict[str, str]) -> Answer:
        """AssumeRoleWithOIDC; parameters may come in the query and in the form alike."""
        is_form = headers.get("content-type", "").startswith("application/x-www-form-urlencoded")
        parameters = dict(query, **(form if is_form else {}))
        refusal = self._sts_refusal(parameters)
        as_json = parameters.get("Format", "XML").upper() == "JSON"
        request_id = secrets.token_hex(16).upper()
        if refusal:
            status, code, message = refusal
            fields = {"RequestId": request_id, "HostId": "sts.aliyuncs.com", "Code": code, "Message": message}
            return Answer(status, json.dumps(fields) if as_json else _xml({"Error": fields}))
        seconds = float(parameters.get("DurationSeconds", "3600"))
        key = self.new_key("STS", min(seconds, self.life))
        names = ("SecurityToken", "Expiration", "AccessKeySecret", "AccessKeyId")
        session = "{}/{}".format(self.role_arn.replace(":role/", ":assumed-role/"), parameters["RoleSessionName"])
        fields = {
            "RequestId": request_id,
            "AssumedRoleUser": {"Arn": session, "AssumedRoleId": "300000:" + parameters["RoleSessionName"]},
            "OIDCTokenInfo": {"Subject": "system:serviceaccount:default:dispatch-data"},
            "Credentials": {name: key[name] for name in names},
        }
        return Answer(200, json.dumps(fields) if as_json else _xml({"AssumeRoleWithOIDCResponse": fields}))

    def _sts_refusal(self, parameters: Dict[str, str]) -> Optional[Tuple[int, str, str]]:
        """Return (status, code, message) of what is wrong, None if nothing is."""
        if parameters.get("Version") != "2015-04-01" or parameters.get("Action") != "AssumeRoleWithOIDC":
            return 404, "InvalidAction.NotFound", "Specified api is not found, please check your url and method."
        for name in _STS_PARAMETERS:
            if not parameters.get(name):
                return 400, "Missing" + name, "{} is mandatory for this action.".format(name)
        if not re.fullmatch(r"[A-Za-z0-9.@_-]{2,64}", parameters["RoleSessionName"]):
            return 400, "InvalidParameter.RoleSessionName", "The parameter RoleSessionName is wrongly formed."
        seconds = parameters.get("DurationSeconds", "3600")
        if not re.fullmatch("[0-9]{1,6}", seconds) or not 900 <= int(seconds) <= 43200:
            return 400, "InvalidParameter.DurationSeconds", "The Min/Max value of DurationSeconds is 15min/12hr."
        if parameters["OIDCProviderArn"] != self.provider_arn:
            return 400, "AuthenticationFail.NoPermission", "No such OIDC Provider registered."
        if parameters["OIDCToken"] not in self.oidc_tokens:
            return 400, "AuthenticationFail.OIDCToken.Expired", "This JsonWebToken is expired."
        if parameters["RoleArn"] != self.role_arn or not self.role_exists:
            return 404, "EntityNotExist.Role", "The role not exists: {}. ".format(parameters["RoleArn"])
        if not self.trusts:
            return 400, "AuthenticationFail.NoPermission", "There is no permission"
        return None


def _xml(tree: Dict[str, object]) -> str:
    return "".join(
        "<{0}>{1}</{0}>".format(name, _xml(value) if isinstance(value, dict) else value) for name, value in tree.items()
    )


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    services: KeyServices


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection, and one request of it. After CONNECT it is STS that answers."""

    server: _Server
    is_sts = False

    def do_CONNECT(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        if not re.fullmatch(r"sts(-vpc)?(\.[a-z0-9-]+)?\.aliyuncs\.com:443", self.path):
            return
        try:
            self.connection = self.server.services._tls.wrap_socket(self.connection, server_side=True)
        except OSError:  # the client does not trust it
            return
        self.rfile, self.wfile = self.connection.makefile("rb", -1), self.connection.makefile("wb", 0)
        self.is_sts = True
        self.handle_one_request()
        self.connection.close()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", "0"))).decode()
        answer = self.server.services.answer(self.command, self.path, headers, body, self.is_sts)
        data = answer.body.encode()
        self.send_response(answer.status)
        for name, value in dict({"Content-Length": str(len(data))}, **answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""
