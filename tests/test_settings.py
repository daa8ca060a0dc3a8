"""Settings: every mistake gets one clear line that names its variable, and shows no secret."""

import dataclasses
import json
import operator
import re
import subprocess
import sys
import time
from datetime import datetime, timezone

import certifi
import pytest
from harness import PROGRAM, run_program

import dispatch_data
from dispatch_data import Routes, SettingsError, read_settings, secret_values

pytestmark = pytest.mark.quick

SECRET = "Secret/key+0"
TOKEN = "Token/0"
OIDC = dict.fromkeys(dispatch_data.OIDC_VARIABLES, "x")
GOOD = {
    "SLS_ENDPOINT": "cn-hangzhou.log.aliyuncs.com",
    "SLS_AK_ID": "id",
    "SLS_AK_KEY": SECRET,
    "SLS_PROJECT": "project",
    "SLS_LOGSTORE": "source",
    "SLS_CG": "group",
    "SLS_LOGSTORE_TO1": "nginx",
}


def with_changes(changes):
    environment = dict(GOOD, **changes)
    return {name: text for name, text in environment.items() if text is not None}


def read(**changes):
    return read_settings(with_changes(changes))


def spelt(topics):
    return tuple(topic.spelling for topic in topics)


def routes_of(settings):
    return Routes({target.number: target.topics for target in settings.targets})


MISTAKES = [
    # what is set (None: not set), the line that must come
    ({"SLS_ENDPOINT": None}, r"SLS_ENDPOINT is missing: "),
    ({"SLS_ENDPOINT": "  "}, r"SLS_ENDPOINT is missing: "),
    ({"SLS_AK_ID": None}, r"SLS_AK_ID is missing: "),
    ({"SLS_AK_KEY": None}, r"SLS_AK_KEY is missing: "),
    ({"SLS_PROJECT": None}, r"SLS_PROJECT is missing: "),
    ({"SLS_LOGSTORE": None}, r"SLS_LOGSTORE is missing: "),
    ({"SLS_CG": None}, r"SLS_CG is missing: "),
    ({"SLS_LOGSTORE_TO1": None}, r"SLS_LOGSTORE_TO1 is missing: at least one target"),
    ({"SLS_ENDPOINT": "ftp://x"}, r"SLS_ENDPOINT: 'ftp://x' is wrong; right would be a host such as"),
    ({"SLS_ENDPOINT": "cn-hangzhou.log.aliyuncs.com/logstores"}, r"SLS_ENDPOINT: .* a host such as"),
    ({"SLS_ENDPOINT": "project.cn-hangzhou.log.aliyuncs.com"}, r"SLS_ENDPOINT: .*without the project"),
    ({"SLS_AK_ID": "with space"}, r"SLS_AK_ID: its value \(not shown\) is wrong; .*without spaces"),
    ({"SLS_AK_KEY": SECRET + "\u00e9"}, r"SLS_AK_KEY: its value \(not shown\) is wrong"),
    ({"SLS_STS_TOKEN": TOKEN + " " + TOKEN}, r"SLS_STS_TOKEN: its value \(not shown\) is wrong"),
    ({"SLS_REGION": "Hang Zhou"}, r"SLS_REGION: 'Hang Zhou' is wrong; right would be a region such as"),
    ({"SLS_ENDPOINT": "h:0"}, r"SLS_ENDPOINT: 'h:0' is wrong; right would be a host such as"),
    ({"SLS_ENDPOINT": "h:99999"}, r"SLS_ENDPOINT: 'h:99999' is wrong"),
    ({"SLS_ENDPOINT": "h:65536"}, r"SLS_ENDPOINT: 'h:65536' is wrong"),
    ({"SLS_ENDPOINT": "h:\u0668\u0660"}, r"SLS_ENDPOINT: .* is wrong"),
    ({"SLS_ENDPOINT": "h:"}, r"SLS_ENDPOINT: 'h:' is wrong"),
    ({"SLS_ENDPOINT": "a..b"}, r"SLS_ENDPOINT: 'a\.\.b' is wrong"),
    ({"SLS_ENDPOINT": "a.b."}, r"SLS_ENDPOINT: 'a\.b\.' is wrong"),
    ({"SLS_ENDPOINT": "-"}, r"SLS_ENDPOINT: '-' is wrong"),
    ({"SLS_ENDPOINT": "a-.b"}, r"SLS_ENDPOINT: 'a-\.b' is wrong"),
    ({"SLS_ENDPOINT": "a" * 64}, r"SLS_ENDPOINT: 'a+' is wrong"),
    ({"SLS_ENDPOINT_TO": "https://:443"}, r"SLS_ENDPOINT_TO: 'https://:443' is wrong"),
    ({"SLS_PROJECT": "a/b"}, r"SLS_PROJECT: 'a/b' is wrong; right would be 3 to 63 lower-case letters"),
    ({"SLS_PROJECT": "My-Project"}, r"SLS_PROJECT: 'My-Project' is wrong"),
    ({"SLS_PROJECT": "my_project"}, r"SLS_PROJECT: 'my_project' is wrong"),
    ({"SLS_PROJECT": "project-"}, r"SLS_PROJECT: 'project-' is wrong"),
    ({"SLS_PROJECT": "p" * 64}, r"SLS_PROJECT: 'p+' is wrong"),
    ({"SLS_LOGSTORE": "a b"}, r"SLS_LOGSTORE: 'a b' is wrong; right would be letters"),
    ({"SLS_CG": "a.b"}, r"SLS_CG: 'a.b' is wrong; right would be up to 64 letters"),
    ({"SLS_LOGSTORE_TO1": "a,b"}, r"SLS_LOGSTORE_TO1: 'a,b' is wrong; right would be letters"),
    ({"SLS_LOGSTORE_TO1": "source"}, r"SLS_LOGSTORE_TO1: project/source is the source itself"),
    ({"SLS_LOGSTORE_TO4": "rest"}, r"SLS_TOPIC_TO4 is missing: "),
    ({"SLS_TOPIC_TO1": "a", "SLS_TOPIC_TO5": "x"}, r"SLS_LOGSTORE_TO5 is missing: "),
    ({"SLS_TOPIC_TO1": "a", "SLS_PROJECT_TO5": "xyz", "SLS_TOPIC_TO5": "x"}, r"SLS_LOGSTORE_TO5 is missing: "),
    ({"SLS_LOGSTORE_TO2": "b", "SLS_TOPIC_TO2": "x"}, r"SLS_TOPIC_TO1 is missing: "),
    ({"SLS_TOPIC_TO1": ""}, r"SLS_TOPIC_TO1 is missing: "),
    ({"SLS_TOPIC_TO1": " , ,"}, r"SLS_TOPIC_TO1: ', ,' is wrong; right would be topics separated by commas"),
    (
        {"SLS_TOPIC_TO1": "my-app", "SLS_LOGSTORE_TO2": "b", "SLS_TOPIC_TO2": "my[-]app"},
        r"SLS_TOPIC_TO2: 'my\[-\]app' is routed by SLS_TOPIC_TO1",
    ),
    (
        {"SLS_TOPIC_TO1": "my-*", "SLS_LOGSTORE_TO2": "b", "SLS_TOPIC_TO2": "my[-]*"},
        r"SLS_TOPIC_TO2: 'my\[-\]\*' is routed by SLS_TOPIC_TO1",
    ),
    (
        {"SLS_TOPIC_TO1": "my[-]*", "SLS_LOGSTORE_TO2": "b", "SLS_TOPIC_TO2": "my[-]**"},
        r"SLS_TOPIC_TO2: 'my\[-\]\*' is routed by SLS_TOPIC_TO1",
    ),
    ({"SLS_TOPIC_TO1": "*", "SLS_LOGSTORE_TO2": "b", "SLS_TOPIC_TO2": "**"}, r"SLS_TOPIC_TO2: '\*' is routed by"),
    (
        {"SLS_TOPIC_TO1": "nginx", "SLS_LOGSTORE_TO2": "b", "SLS_TOPIC_TO2": "sql, nginx"},
        r"SLS_TOPIC_TO2: 'nginx' is routed by SLS_TOPIC_TO1",
    ),
    ({"SLS_TOPIC_TO1": "ngnix,"}, r"SLS_TOPIC_TO1: 'ngnix,' is wrong; .* cut off at a space"),
    ({"SLS_TOPIC_TO1": ",nginx"}, r"SLS_TOPIC_TO1: ',nginx' is wrong; .* one on either side of each"),
    ({"SLS_TOPIC_TO1": "a, ,b"}, r"SLS_TOPIC_TO1: 'a, ,b' is wrong"),
    ({"SLS_TOPIC_TO1": "a\nb"}, r"SLS_TOPIC_TO1: 'a\\nb' is wrong; right would be topics .*separated by commas"),
    ({"SLS_TOPIC_TO1": "nginx # the web servers"}, r"SLS_TOPIC_TO1: .* is wrong; .* what follows # is no comment to"),
    ({"SLS_TOPIC_TO1": "nginx #web"}, r"SLS_TOPIC_TO1: .* is wrong; .* comment"),
    ({"SLS_TOPIC_TO1": "# the web servers"}, r"SLS_TOPIC_TO1: .* is wrong; .* comment"),
    ({"SLS_PROJECT": "project # prod"}, r"SLS_PROJECT: .* is wrong; .* comment"),
    ({"SLS_AK_KEY": SECRET + " # ours"}, r"SLS_AK_KEY: its value \(not shown\) is wrong; .* comment"),
    ({"SLS_STS_TOKEN": "# none"}, r"SLS_STS_TOKEN: its value \(not shown\) is wrong; .* comment"),
    ({"SLS_PROJECT": "<your project>"}, r"SLS_PROJECT: .* is wrong; .*; it holds a placeholder"),
    (
        {"SLS_LOGSTORE_TO1": "${LOGSTORE}"},
        r"SLS_LOGSTORE_TO1: .* is wrong; .*; it holds a variable that nothing has rep",
    ),
    ({"SLS_WRITERS": "%WRITERS%"}, r"SLS_WRITERS: .* is wrong; .*; it holds a variable"),
    (
        {"SLS_METRICS_PORT": "tcp://10.96.12.7:9464"},
        r"SLS_METRICS_PORT: .* is wrong; .* Kubernetes .*enableServiceLinks",
    ),
    ({"SLS_AK_ID": None, "ALIBABA_CLOUD_ACCESS_KEY_ID": "x"}, r"SLS_AK_ID is missing: .*; ALIBABA_CLOUD_ACCESS_KEY_ID"),
    (
        {"SLS_AK_KEY": None, "ALIYUN_ACCESS_KEY_SECRET": "x"},
        r"SLS_AK_KEY is missing: .*; ALIYUN_ACCESS_KEY_SECRET is se",
    ),
    ({"SLS_PROJECT": "pro\uff0cject"}, "SLS_PROJECT: .* is wrong; .*; '\uff0c' is a full-width character$"),
    ({"SLS_WRITERS": "8\uff0c"}, "SLS_WRITERS: .* is wrong; .*; '\uff0c' is a full-width character$"),
    ({"SLS_CURSOR_START": "1545753600000"}, r"SLS_CURSOR_START: '1545753600000' is wrong"),
    ({"SLS_TOPIC_TO1": '"a","b"'}, r"SLS_TOPIC_TO1: .*right would be .* quotes around all of them or none"),
    (
        {"SLS_TOPIC_TO1": "access\uff0cerror"},
        "SLS_TOPIC_TO1: 'access\uff0cerror' is wrong; .*; '\uff0c' is a full-width character, type ',' instead",
    ),
    ({"SLS_TOPIC_TO1": "a\uff0a"}, "SLS_TOPIC_TO1: .* '\uff0a' is a full-width character, type '\\*' instead"),
    ({"SLS_TOPIC_TO1": "a:\uff1f"}, "SLS_TOPIC_TO1: .* type '\\?' instead"),
    ({"SLS_TOPIC_TO1": "a\uff1ab"}, "SLS_TOPIC_TO1: .* type ':' instead"),
    ({"SLS_TOPIC_TO1": "app\u30101\u3011"}, "SLS_TOPIC_TO1: .* type '\\[' instead"),
    ({"SLS_TOPIC_TO1": "a\u3001b"}, "SLS_TOPIC_TO1: .* type ',' instead"),
    ({"SLS_TOPIC_TO1": "a\u3000b"}, "SLS_TOPIC_TO1: .* type ' ' instead"),
    ({"SLS_TOPIC_TO1": "\u201caccess, error\u201d"}, "SLS_TOPIC_TO1: .* type '\"' instead"),
    ({"SLS_ENDPOINT": "https\uff1a//e"}, "SLS_ENDPOINT: .* '\uff1a' is a full-width character, type ':' instead"),
    ({"SLS_WRITERS": "\uff18"}, "SLS_WRITERS: .* type '8' instead"),
    ({"SLS_CURSOR_START": "2018-12-26 00\uff1a00"}, "SLS_CURSOR_START: .* type ':' instead"),
    ({"SLS_AK_KEY": SECRET + "\uff0c"}, "SLS_AK_KEY: its value \\(not shown\\) is wrong; [^\uff0c]*$"),
    ({"SLS_AK_ID_TO": "other"}, r"SLS_AK_KEY_TO is missing: "),
    ({"SLS_AK_KEY_TO1": "other"}, r"SLS_AK_ID_TO1 is missing: "),
    ({"SLS_STS_TOKEN_TO1": TOKEN, "SLS_AK_KEY_TO1": SECRET}, r"SLS_AK_ID_TO1 is missing: "),
    ({"SLS_PROJECT_TO": "a/b"}, r"SLS_PROJECT_TO: 'a/b' is wrong"),
    ({"SLS_ENDPOINT_TO1": "a/b"}, r"SLS_ENDPOINT_TO1: 'a/b' is wrong"),
    ({"SLS_CURSOR_START": "yesterday"}, r"SLS_CURSOR_START: 'yesterday' is wrong; right would be begin, end, or"),
    ({"SLS_CURSOR_START": "2018-13-26"}, r"SLS_CURSOR_START: '2018-13-26' is wrong"),
    ({"SLS_CURSOR_START": "1969-12-31T00:00:00Z"}, r"SLS_CURSOR_START: .* is wrong"),
    ({"SLS_CURSOR_START": "2018-12-26T24:00:00Z"}, r"SLS_CURSOR_START: .* is wrong"),
    ({"SLS_CURSOR_START": "2018-12-26T00:00:00 CST"}, r"SLS_CURSOR_START: .* is wrong; right would be begin, end, or"),
    ({"SLS_CURSOR_START": "2018-12-26T00:00:00 Asia/Shanghai"}, r"SLS_CURSOR_START: .* is wrong"),
    ({"SLS_CURSOR_START": "2018-12-26T00:00:00 EST5EDT"}, r"SLS_CURSOR_START: .* is wrong"),
    ({"SLS_CURSOR_START": "2018-12-26T00:00:00+15:00"}, r"SLS_CURSOR_START: .* is wrong"),
    ({"SLS_CURSOR_START": "2018-12-26T00:00:00+08:60"}, r"SLS_CURSOR_START: .* is wrong"),
    ({"SLS_CURSOR_START": "2018-12-26 10pm"}, r"SLS_CURSOR_START: .* is wrong"),
    ({"SLS_CURSOR_START": "2018-12-26 +08:00"}, r"SLS_CURSOR_START: .* is wrong"),
    ({"SLS_CURSOR_START": "\u0662\u0660\u0661\u0668-12-26"}, r"SLS_CURSOR_START: .* is wrong"),
    (
        {"SLS_CURSOR_START": "2999-01-01T00:00:00Z"},
        r"SLS_CURSOR_START: .* is wrong; right would be a time that has passed; this machine's clock says 2\d\d\d-",
    ),
    ({"SLS_HEARTBEAT_INTERVAL": "20s"}, r"SLS_HEARTBEAT_INTERVAL: '20s' is wrong; right would be whole seconds from 1"),
    ({"SLS_HEARTBEAT_INTERVAL": "0"}, r"SLS_HEARTBEAT_INTERVAL: '0' is wrong"),
    ({"SLS_HEARTBEAT_INTERVAL": "1.5"}, r"SLS_HEARTBEAT_INTERVAL: '1.5' is wrong"),
    ({"SLS_FETCH_INTERVAL": "nan"}, r"SLS_FETCH_INTERVAL: 'nan' is wrong; right would be seconds from 0.01 to 60"),
    ({"SLS_FETCH_INTERVAL": "-1"}, r"SLS_FETCH_INTERVAL: '-1' is wrong"),
    ({"SLS_WRITERS": "0"}, r"SLS_WRITERS: '0' is wrong; right would be a whole number from 1 to 64"),
    ({"SLS_HEARTBEAT_INTERVAL": "1_0"}, r"SLS_HEARTBEAT_INTERVAL: '1_0' is wrong"),
    ({"SLS_WRITERS": "\u0663"}, r"SLS_WRITERS: '\u0663' is wrong"),
    ({"SLS_WRITERS": "9" * 5000}, r"SLS_WRITERS: '9+' is wrong"),
    ({"SLS_FETCH_INTERVAL": "1e1"}, r"SLS_FETCH_INTERVAL: '1e1' is wrong"),
    ({"SLS_FETCH_INTERVAL": "inf"}, r"SLS_FETCH_INTERVAL: 'inf' is wrong"),
    ({"SLS_FETCH_INTERVAL": "1_0.5"}, r"SLS_FETCH_INTERVAL: '1_0.5' is wrong"),
    ({"SLS_MERGE_PACKS": "maybe"}, r"SLS_MERGE_PACKS: 'maybe' is wrong; right would be true or false"),
    ({"SLS_LOG_DIR": "/no/such/directory"}, r"SLS_LOG_DIR: '/no/such/directory' is wrong; right would be a directory"),
    (
        {"SLS_REJECTED_DIR": "/no/such"},
        r"SLS_REJECTED_DIR: '/no/such' is wrong; right would be a directory that exists",
    ),
    (
        {"REQUESTS_CA_BUNDLE": "/no/such.pem"},
        r"REQUESTS_CA_BUNDLE: '/no/such.pem' is wrong; right would be a file of CA",
    ),
    (
        {"REQUESTS_CA_BUNDLE": __file__},
        r"REQUESTS_CA_BUNDLE: '.*test_settings\.py' is wrong; .* or a directory of such",
    ),
    (
        {"CURL_CA_BUNDLE": "/dev/null"},
        r"CURL_CA_BUNDLE: '/dev/null' is wrong; right would be a file of CA certificates",
    ),
    ({"SLS_ENDPOINT": "htps://cn-hangzhou.log.aliyuncs.com"}, r"SLS_ENDPOINT: 'htps://.*' is wrong"),
    ({"SLS_LOGSTORE_TO1": "../nginx"}, r"SLS_LOGSTORE_TO1: '../nginx' is wrong"),
    ({"SLS_PROJECT_TO": "a%2Fb"}, r"SLS_PROJECT_TO: 'a%2Fb' is wrong"),
    ({"SLS_CG": "a\nb"}, r"SLS_CG: 'a\\nb' is wrong"),
    ({"SLS_LOG_LEVEL": "LOUD"}, r"SLS_LOG_LEVEL: 'LOUD' is wrong; right would be DEBUG, INFO"),
    ({"SLS_METRICS_PORT": "0"}, r"SLS_METRICS_PORT: '0' is wrong; right would be a port from 1 to 65535"),
    ({"SLS_METRICS_PORT": "65536"}, r"SLS_METRICS_PORT: '65536' is wrong"),
    ({"SLS_METRICS_PORT": ":9464"}, r"SLS_METRICS_PORT: ':9464' is wrong"),
    ({"SLS_METRICS_HOST": "localhost"}, r"SLS_METRICS_HOST: 'localhost' is wrong; right would be an address of this"),
    ({"SLS_METRICS_HOST": "127.0.0.1:9464"}, r"SLS_METRICS_HOST: '127.0.0.1:9464' is wrong"),
]


@pytest.mark.parametrize(
    "changes, line",
    MISTAKES,
    ids=[" ".join(changes) + " " + str(number) for number, (changes, _) in enumerate(MISTAKES)],
)
def test_a_mistake_gets_one_line(changes, line):
    with pytest.raises(SettingsError) as caught:
        read(**changes)
    (problem,) = caught.value.args
    assert re.match(line, problem), problem
    assert "\n" not in problem and SECRET not in problem and TOKEN not in problem


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_proxy_that_is_no_url_is_refused_and_its_password_not_shown(name):
    endpoint = "https://e" if name.lower() == "https_proxy" else "http://e"  # one that it is used for
    wrong = ["user:pass-word@", "http://", ":8080", "http://user:pass-word@:1", "http://h:0", "h:99999", "ftp://h:21"]
    for url in [*wrong, "http://a b", "http://h/path", "http://[::1", "http://us[er:pass-word@h", "-", " http://h:1"]:
        with pytest.raises(SettingsError) as caught:
            read(**{"SLS_ENDPOINT": endpoint, name: url})
        (problem,) = caught.value.args
        assert problem.startswith(name + ": its value (not shown) is wrong; right would be a URL such as"), problem
        assert "pass-word" not in problem
    for url in ["", "h", "h:80", "http://h:80/", "HTTPS://h", "socks5h://user:p%40ss@h:1080", "u:p@ss@my_proxy:3128"]:
        read(**{"SLS_ENDPOINT": endpoint, name: url})
    read(**{"SLS_ENDPOINT": endpoint, name: "http://[::1]:3128"})


def test_a_proxy_that_is_no_url_ends_the_program_in_one_line():
    for url in ("user:pass-word@", "http://[::1"):
        ended = run_program(with_changes({"SLS_ENDPOINT": "https://e", "https_proxy": url}))
        assert (ended.returncode, ended.stdout) == (2, "")
        assert re.fullmatch(r"dispatch_data\.py: https_proxy: [^\n]*\n", ended.stderr)
        assert "pass-word" not in ended.stderr


def test_all_mistakes_are_told_at_once_and_nothing_starts(tmp_path):
    environment = with_changes(
        {
            "SLS_PROJECT": None,
            "SLS_AK_KEY": SECRET + " x",
            "SLS_LOGSTORE_TO9": "rest",
            "SLS_HEARTBEAT_INTERVAL": "soon",
            "SLS_LOG_DIR": str(tmp_path),
            "SLS_LOGSTOR_TO2": "x",
        }
    )
    ended = run_program(environment)
    assert ended.returncode == 2
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert ".env.example" in lines.pop()
    assert [re.match(r"dispatch_data\.py: (SLS_\w+)", line).group(1) for line in lines] == [
        "SLS_AK_KEY",
        "SLS_PROJECT",
        "SLS_TOPIC_TO9",
        "SLS_HEARTBEAT_INTERVAL",
        "SLS_LOGSTOR_TO2",
    ]
    assert "did you mean SLS_LOGSTORE_TO2?" in lines[-1]
    assert SECRET not in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("SLS_TOPICS_TO2", "SLS_TOPIC_TO2"),
        ("SLS_LOGSTORE_T01", "SLS_LOGSTORE_TO1"),
        ("SLS_AK_SECRET", "SLS_AK_KEY"),
        ("SLS_ACCESS_KEY_SECRET", "SLS_AK_KEY"),
        ("SLS_ACCESS_KEY_SECRET_TO2", "SLS_AK_KEY_TO2"),
        ("SLS_ACCESS_KEY_ID", "SLS_AK_ID"),
        ("SLS_SECURITY_TOKEN_TO", "SLS_STS_TOKEN_TO"),
        ("SLS_CONSUMER_GROUP", "SLS_CG"),
        ("SLS_START_POSITION", "SLS_CURSOR_START"),
        ("SLS_HEARTBEAT", "SLS_HEARTBEAT_INTERVAL"),
        ("sls_logstore_to2", "SLS_LOGSTORE_TO2"),
        ("Sls_Fetch_Interval", "SLS_FETCH_INTERVAL"),
        ("SLS_PROJEKT", "SLS_PROJECT"),
        ("SLS_ENDPONT_TO", "SLS_ENDPOINT_TO"),
        ("SLS_LOGSTORE_TO0", "SLS_LOGSTORE_TO"),
        ("SLS_LOGSTORE_TO" + "9" * 5000, "SLS_LOGSTORE_TO"),
    ],
)
def test_an_unknown_name_earns_a_warning_with_the_nearest_known(name, nearest):
    (warning,) = read(**{"SLS_TOPIC_TO1": "a", name: "x"}).warnings
    assert warning.startswith(name + " is not a setting")
    assert "did you mean %s" % nearest in warning


def test_what_kubernetes_sets_for_a_service_is_named_for_what_it_is():
    names = ["SLS_METRICS_SERVICE_HOST", "SLS_METRICS_SERVICE_PORT", "SLS_METRICS_SERVICE_PORT_HTTP"]
    names += ["SLS_METRICS_PORT_9464_TCP", "SLS_METRICS_PORT_9464_TCP_ADDR", "SLS_PORT", "SLS_SERVICE_HOST"]
    (warning,) = read(SLS_TOPIC_TO1="a", **dict.fromkeys(names, "x")).warnings
    assert "Kubernetes" in warning and "enableServiceLinks: false" in warning
    assert set(re.findall(r"SLS_\w+", warning)) == set(names)


# What other programs take for a list, a choice, a regular expression: (what is set, a word of what is right here).
FOREIGN = [
    ("{nginx,apache}*", "nginx*,apache*"),
    ("nginx;access", "commas"),
    ("nginx|access", "commas"),
    ("access.*|error.*", "commas"),
    ("[nginx, access]", "leave them out"),
    ("nginx access", "space"),
    ("nginx, access error", "space"),
    ("^nginx$", "compared as a whole"),
    ("nginx$", "compared as a whole"),
    ("a,^nginx", "compared as a whole"),
    ("/^nginx/", "compared as a whole"),
    (".*nginx", "regular expression"),
    ("a,.*", "regular expression"),
    ("nginx.+", "regular expression"),
    (r"app\d", "regular expression"),
    ("[^a]*", "[!...]"),
    (r"a\,b", "[,]"),
    (r"app\*", "[*]"),
    ("*,!debug", "excluded"),
    ("__topic__: nginx", "without a name"),
    ("topic=nginx", "without a name"),
    ("regex:nginx", "without a name"),
    ("nginx%", "stands for any characters"),
    ("${TOPIC}", "variable"),
    ("$TOPIC", "variable"),
    ("$(topics)", "variable"),
    ("%TOPIC%", "variable"),
    ("{{ .Values.topic }}", "variable"),
    ("<your topic>", "placeholder"),
]


@pytest.mark.parametrize("text, word", FOREIGN)
def test_another_program_s_notation_earns_a_warning_that_says_how_it_is_written_here(text, word):
    warnings = [each for each in read(SLS_TOPIC_TO1=text).warnings if "looks wrong" in each]
    (warning,) = warnings
    assert warning.startswith("SLS_TOPIC_TO1: %r looks wrong: " % text) and word in warning


@pytest.mark.parametrize(
    "text",
    [
        "access.*",
        "com.example.*",
        "a-b_c/d:e",
        "/var/log/*.log",
        r"C:\logs\app",
        "Class$Inner",
        "\u65e5\u5fd7",
        "#general",
    ]
    + [
        "50%off",
        "a@b",
        "nginx,access_*,[!a]?",
        "app.?",
        "a=b",
        "a,b , c",
        "what!",
        "a[ ]b[;]c[|]d[%],[#]e",
        "~`'s&+()",
    ],
)
def test_topics_that_may_well_be_meant_so_earn_none(text):
    assert read(SLS_TOPIC_TO1=text).warnings == ()


@pytest.mark.parametrize("char", " ,;|#$%^&*?[{}<>\\~`'\"()-+=./:@")
def test_what_is_no_letter_is_itself_alone_in_brackets(char):
    text, topic = "a[%s]b" % char, "a%sb" % char
    assert topics_found([text, "a?b"], [topic, "a_b", text]) == ([1, 2, None], ())
    assert topics_found(["x,[%s],y" % char], [char, "x", "y"]) == ([1, 1, 1], ())


@pytest.mark.parametrize("name", ["SLS_AK_ID", "SLS_AK_KEY", "SLS_STS_TOKEN"])
@pytest.mark.parametrize("text", ["${KEY}", "<your-key>", "$(cat,key)"])
def test_a_key_that_nobody_has_filled_in_is_warned_about_and_not_shown(name, text):
    (warning,) = [each for each in read(SLS_TOPIC_TO1="a", **{name: text}).warnings if "renew" not in each]
    assert warning.startswith(name + ": its value (not shown) looks wrong: it holds a ") and text not in warning


def test_default_topics_without_a_logstore_are_named():
    """As when one variable is exported three times."""
    assert read().warnings == (
        "no SLS_LOGSTORE_TO2 is set: its default topics, sql_audit, go nowhere",
        "no SLS_LOGSTORE_TO3 is set: its default topics, click, go nowhere",
    )
    assert read(SLS_LOGSTORE_TO2="b", SLS_LOGSTORE_TO3="c").warnings == ()


def test_a_pattern_behind_one_that_takes_all_is_named():
    numbers, (warning,) = topics_found(["a,*", "app-*,b"], ["app-1", "b"])
    assert numbers == [1, 2]
    assert warning == "SLS_TOPIC_TO2: 'app-*' takes nothing: the * of SLS_TOPIC_TO1 comes first, and takes all"
    assert topics_found(["app-*", "*,b,c*"], ["app-1", "b", "c"]) == ([1, 2, 2], ())


@pytest.mark.parametrize("zone, offset", [("UTC+8", "-0800"), ("Asia/Beijing", "+0000"), ("Asia/Shanghai", "+0800")])
def test_a_start_without_offset_is_warned_about_with_what_it_is_taken_for(monkeypatch, zone, offset):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        for text in ("2018-12-26 00:00:00", "2018-12-26"):
            (warning,) = read(SLS_TOPIC_TO1="a", SLS_CURSOR_START=text).warnings
            assert warning.startswith("SLS_CURSOR_START: %r has no offset" % text)
            assert "%s by TZ=%r" % (offset, zone) in warning and "T00:00:00+08:00" in warning
        for text in ("2018-12-26 00:00:00+08", "2018-12-26T00:00Z", "2018-12-26 0:0 UTC", "1545753600", "begin", "end"):
            assert read(SLS_TOPIC_TO1="a", SLS_CURSOR_START=text).warnings == ()
    finally:
        monkeypatch.undo()
        time.tzset()


UNMISTAKABLE = [
    ("SLS_ENDPOINT", "HTTPS://Host:443/", "source.endpoint", "https://Host:443/"),
    ("SLS_LOG_LEVEL", "info", "log_level", "INFO"),
    ("SLS_LOG_LEVEL", "Warn", "log_level", "WARNING"),
    ("SLS_MERGE_PACKS", "1", "merge_packs", True),
    ("SLS_MERGE_PACKS", "Yes", "merge_packs", True),
    ("SLS_MERGE_PACKS", "off", "merge_packs", False),
    ("SLS_CURSOR_START", "earliest", "cursor_start", "begin"),
    ("SLS_CURSOR_START", "Latest", "cursor_start", "end"),
    ("SLS_CURSOR_START", "BEGIN", "cursor_start", "begin"),
    ("SLS_CURSOR_START", "1545753600", "cursor_start", 1545753600),
]


@pytest.mark.parametrize("name, text, attribute, value", UNMISTAKABLE, ids=[" ".join(row[:2]) for row in UNMISTAKABLE])
def test_what_is_unmistakable_is_taken(name, text, attribute, value):
    settings = read(SLS_TOPIC_TO1="a", **{name: text})
    assert operator.attrgetter(attribute)(settings) == value and settings.warnings == ()


def test_only_what_is_used_of_the_network_s_variables_is_judged():
    unused = [
        {"http_proxy": "http://h:1", "all_proxy": "socks://h:1", "ALL_PROXY": "nonsense/"},
        {"http_proxy": "", "HTTP_PROXY": "socks://h:1"},
        {"http_proxy": "http://h:1", "HTTP_PROXY": "socks://h:1", "https_proxy": "socks://h:1"},
        {"REQUESTS_CA_BUNDLE": certifi.where(), "CURL_CA_BUNDLE": "/no/such.pem"},
    ]
    for changes in unused:
        assert read(SLS_ENDPOINT="http://e", SLS_TOPIC_TO1="a", **changes).warnings == ()
    used = [
        {"https_proxy": "http://h:1", "all_proxy": "socks://h:1", "SLS_ENDPOINT_TO": "http://e"},
        {"https_proxy": "socks://h:1"},
        {"https_proxy": "", "HTTPS_PROXY": "http://h:1", "all_proxy": "socks://h:1"},
        {"SLS_ENDPOINT": "http://e", "SLS_CREDENTIALS_TO": "oidc", "https_proxy": "socks://h:1", **OIDC},
    ]
    for changes in used:
        with pytest.raises(SettingsError, match="proxy: its value"):
            read(**{"SLS_ENDPOINT": "https://e", **changes})


def test_a_file_of_settings_that_nobody_has_exported_is_pointed_at(tmp_path):
    (tmp_path / ".env").write_text("SLS_PROJECT=project\n")
    lines = run_program({}, cwd=tmp_path).stderr.splitlines()
    assert (
        lines[-2] == "dispatch_data.py: .env is there, but nobody has exported what it sets: set -a; . ./.env; set +a"
    )
    assert ".env is there" not in run_program(dict(GOOD, SLS_WRITERS="0"), cwd=tmp_path).stderr


def test_on_windows_one_line_says_where_it_runs():
    script = "import runpy, sys; sys.modules['resource'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", script, str(PROGRAM)], env={}, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"dispatch_data\.py: .*WSL or a container\n", ended.stderr)


@pytest.mark.parametrize(
    "topic, shown",
    [
        ("caf\u00e9", "caf\u00e9"),
        ("cafe\u0301", r"cafe\u0301"),
        ("nginx ", r"nginx\u0020"),
        ("  nginx", r"\u0020\u0020nginx"),
        ("ngin\u0445", r"ngin\u0445"),
        ("a b", "a b"),
        ("\u65e5\u5fd7", "\u65e5\u5fd7"),
        ("\u043b\u043e\u0433", "\u043b\u043e\u0433"),
        ("", "[]"),
    ],
)
def test_topics_that_look_alike_are_shown_unlike(topic, shown):
    counter = dispatch_data.UnmatchedCounter()
    for _ in range(2):
        counter.add(dispatch_data.LogGroup(topic, 1, b"", b""))
    (found,) = re.findall("unmatched_topics=(.*)", counter.summary())
    assert json.loads(found) == shown + " 2"


def test_no_warning_without_need():
    changes = {"SLS_REGION_TO1": "cn-hangzhou", "SLS_PROJECT_TO": "xyz", "SLS_CURSOR_START": "end"}
    assert read(SLS_TOPIC_TO1="a", **changes).warnings == ()


@pytest.mark.parametrize(
    "changes, variable, mended",
    [
        ({"SLS_REGION": "cn-hangzou"}, "SLS_REGION", "SLS_REGION=cn-hangzhou"),
        ({"SLS_REGION": "cn-hangzhou", "SLS_ENDPOINT_TO": "cn-beijing-intranet.log.aliyuncs.com"}, "SLS_REGION",
         "SLS_REGION_TO=cn-beijing"),
        ({"SLS_REGION_TO": "cn-beijing", "SLS_PROJECT_TO": "xyz"}, "SLS_REGION_TO", "SLS_REGION_TO=cn-hangzhou"),
        ({"SLS_REGION": "cn-hangzhou", "SLS_ENDPOINT_TO": "logs.example.com"}, "", ""),
        ({"SLS_REGION": "cn-hangzhou-finance-1", "SLS_ENDPOINT": "cn-hangzhou-finance.log.aliyuncs.com"}, "", ""),
    ],
)  # fmt: skip
def test_a_region_other_than_the_endpoint_s_is_told(changes, variable, mended):
    """Signatures are made for it, and what a service says of them names the key instead."""
    warnings = read(SLS_TOPIC_TO1="a", **changes).warnings
    assert [line.partition(":")[0] for line in warnings] == [variable] * bool(variable)
    assert not variable or warnings[0].endswith("; set " + mended)


def test_defaults():
    settings = read()
    assert {name: getattr(settings, name) for name in dispatch_data.TUNING_SETTINGS} == {
        "cursor_start": "begin",
        "heartbeat_interval": 20,
        "fetch_interval": 0.4,
        "writers": 16,
        "merge_packs": False,
        "rejected_dir": "",
        "log_dir": ".",
        "log_level": "INFO",
        "metrics_port": "",
        "metrics_host": "127.0.0.1",
    }
    (target,) = settings.targets
    assert (target.number, spelt(target.topics)) == (1, ("ngnix", "nginx"))
    assert target.config == dataclasses.replace(settings.source, logstore="nginx")
    assert target.config.connection == settings.source.connection
    settings = read(SLS_LOGSTORE_TO2="b", SLS_LOGSTORE_TO3="c")
    assert [spelt(target.topics) for target in settings.targets] == [("ngnix", "nginx"), ("sql_audit",), ("click",)]


def test_what_the_settings_came_to_is_said(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        assert read().notes == (
            "SLS_CURSOR_START, where a group without checkpoints begins: begin",
            "no SLS_TOPIC_TO<n> is set: the default topics apply",
        )
        settings = read(SLS_TOPIC_TO1="x", SLS_CURSOR_START="2018-12-26")
        (start,) = settings.notes
        assert start.endswith(" begins: 2018-12-26 00:00:00 +0800 (2018-12-25 16:00:00 UTC)")
    finally:
        monkeypatch.undo()
        time.tzset()


def test_each_target_takes_what_it_does_not_set_from_the_line_above():
    settings = read(
        SLS_TOPIC_TO1="a",
        SLS_LOGSTORE_TO2="b",
        SLS_TOPIC_TO2="b",
        SLS_LOGSTORE_TO30="c",
        SLS_TOPIC_TO30="x",
        SLS_STS_TOKEN=TOKEN,
        SLS_REGION="r",
        SLS_PROJECT_TO="ppp",
        SLS_AK_ID_TO="id-to",
        SLS_AK_KEY_TO="key-to",
        SLS_ENDPOINT_TO2="https://e2",
        SLS_REGION_TO2="r2",
        SLS_PROJECT_TO2="pp2",
        SLS_AK_ID_TO30="id-30",
        SLS_AK_KEY_TO30="key-30",
        SLS_STS_TOKEN_TO30="token-30",
    )
    one, two, thirty = [target.config for target in settings.targets]
    keys = ["endpoint", "access_key_id", "access_key", "security_token", "credentials", "region", "project", "logstore"]
    assert [tuple(getattr(config, key) for key in keys) for config in (one, two, thirty)] == [
        (GOOD["SLS_ENDPOINT"], "id-to", "key-to", "", "", "r", "ppp", "nginx"),
        ("https://e2", "id-to", "key-to", "", "", "r2", "pp2", "b"),
        (GOOD["SLS_ENDPOINT"], "id-30", "key-30", "token-30", "", "r", "ppp", "c"),
    ]
    assert [two.variables[name] for name in ("SLS_LOGSTORE", "SLS_PROJECT", "SLS_AK_KEY", "SLS_REGION")] == [
        "SLS_LOGSTORE_TO2",
        "SLS_PROJECT_TO2",
        "SLS_AK_KEY_TO",
        "SLS_REGION_TO2",
    ]
    assert (one.variables["SLS_ENDPOINT"], one.variables["SLS_STS_TOKEN"]) == ("SLS_ENDPOINT", "SLS_STS_TOKEN_TO")
    assert settings.source.security_token == TOKEN
    assert sorted(secret_values(settings)) == sorted([SECRET, TOKEN, "key-to", "key-to", "key-30", "token-30"])


def test_values_may_have_space_around_them():
    assert spelt(read(SLS_PROJECT=" project \r", SLS_TOPIC_TO1=" a ,b").targets[0].topics) == ("a", "b")


@pytest.mark.parametrize("text", ['"a, b c"', "'a, b c'", ' "a , b c" '])
def test_values_may_be_quoted_where_no_shell_takes_the_quotes_away(text):
    assert spelt(read(SLS_TOPIC_TO1=text, SLS_WRITERS='"4"').targets[0].topics) == ("a", "b c")


@pytest.mark.parametrize(
    "endpoint",
    [
        "cn-hangzhou.log.aliyuncs.com:80",
        "https://cn-hangzhou.log.aliyuncs.com:443",
        "https://CN-Hangzhou.log.aliyuncs.com/",
        "cn-hangzhou-intranet.log.aliyuncs.com",
        "http://cn-hangzhou-internal.log.aliyuncs.com",
        "cn-hangzhou-share.log.aliyuncs.com",
        "cn-hangzhou-vpc.log.aliyuncs.com",
        "cn-hangzhou-intranet.sls.aliyuncs.com",
        "log-global.aliyuncs.com",
        "100.100.0.1:8080",
        "sls.company.example",
    ],
)
def test_the_source_is_no_target_however_its_endpoint_is_written(endpoint):
    for names in (("SLS_ENDPOINT", "SLS_ENDPOINT_TO"), ("SLS_ENDPOINT_TO1", "SLS_ENDPOINT")):
        changes = dict.fromkeys(names, GOOD["SLS_ENDPOINT"])
        changes[names[0]] = endpoint
        with pytest.raises(SettingsError, match="SLS_LOGSTORE_TO1: project/source is the source itself"):
            read(SLS_LOGSTORE_TO1="source", **changes)
        read(SLS_LOGSTORE_TO1="other", **changes)
        read(SLS_LOGSTORE_TO1="source", SLS_PROJECT_TO="other", **changes)


@pytest.mark.parametrize(
    "endpoint", ["cn-beijing-intranet.log.aliyuncs.com", "cn-hangzhou-finance.log.aliyuncs.com:80"]
)
def test_two_regions_may_have_projects_of_one_name(endpoint):
    read(SLS_LOGSTORE_TO1="source", SLS_ENDPOINT_TO="https://" + endpoint)


def test_regions_that_are_set_tell_two_clouds_apart_unless_the_endpoints_name_them():
    hosts = {"SLS_LOGSTORE_TO1": "source", "SLS_ENDPOINT": "sls.one.example", "SLS_ENDPOINT_TO": "sls.two.example"}
    read(SLS_REGION="cn-one", SLS_REGION_TO="cn-two", **hosts)
    read(SLS_REGION_TO="cn-two", **{**hosts, "SLS_ENDPOINT": GOOD["SLS_ENDPOINT"]})
    same = {**hosts, "SLS_ENDPOINT": GOOD["SLS_ENDPOINT"], "SLS_ENDPOINT_TO": "cn-hangzhou-intranet.log.aliyuncs.com"}
    for changes in (
        {"SLS_REGION": "cn-one", **hosts},
        {"SLS_REGION_TO": "cn-two", **hosts},
        {"SLS_REGION": "cn-one", "SLS_REGION_TO": "cn-two", **same},
    ):
        with pytest.raises(SettingsError, match="is the source itself"):
            read(**changes)


def test_an_empty_log_dir_means_stderr_alone():
    assert read(SLS_LOG_DIR="").log_dir == ""
    assert read(SLS_LOG_LEVEL="").log_level == "INFO"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("begin", "begin"),
        ("end", "end"),
        ("2018-12-26T00:00:00+08:00", 1545753600),
        ("2018-12-26T00:00:00Z", 1545782400),
        ("2018-12-26T08:00+0800", 1545782400),
        ("2018-12-26 08:00:00.250 +08", 1545782400),
        ("2018-12-26T08:00:00 UTC+8", 1545782400),
        ("2018-12-26T08:00:00 GMT+08:00", 1545782400),
        ("2018-12-26T08:00:00utc+8", 1545782400),
        ("2018-12-25T19:00:00-05:00", 1545782400),
        ("2018-12-26T05:45:00+05:45", 1545782400),
        ("2018-12-26t00:00:00z", 1545782400),
        ("2018-12-26 00:00:00 UTC", 1545782400),
        ("1970-01-01T00:00:00Z", 0),
        ("2018-12-26 0:0:0", int(datetime(2018, 12, 26).timestamp())),
        ("2018-12-26", int(datetime(2018, 12, 26).timestamp())),
    ],
)
def test_cursor_start(text, expected):
    assert read(SLS_CURSOR_START=text).cursor_start == expected
    assert datetime.fromtimestamp(1545782400, timezone.utc).year == 2018


def test_routes():
    settings = read(
        SLS_TOPIC_TO1="a*,*.log",
        SLS_LOGSTORE_TO2="b",
        SLS_TOPIC_TO2="abc,[0-9]?",
        SLS_LOGSTORE_TO10="c",
        SLS_TOPIC_TO10="ab*,z",
    )
    find = routes_of(settings).target_of
    assert [find(topic) for topic in ("abc", "abd", "a", "x.log", "12", "z", "", "b", "ABC")] == [
        2,
        1,
        1,
        1,
        2,
        10,
        None,
        None,
        None,
    ]


def topics_found(topic_lists, topics):
    """Routes each topic by targets with these SLS_TOPIC_TO<n>, n from 1; gives the numbers, and the warnings."""
    settings = read(
        **{"SLS_LOGSTORE_TO%d" % (number + 1): "target" for number in range(len(topic_lists))},
        **{"SLS_TOPIC_TO%d" % (number + 1): text for number, text in enumerate(topic_lists)},
    )
    find = routes_of(settings).target_of
    return [find(topic) for topic in topics], settings.warnings


def test_a_wildcard_in_brackets_is_the_character_itself():
    found, warnings = topics_found(
        ["app[[]1],what[?],[*],[[]]", "app?1?,*"], ["app[1]", "what?", "*", "[]", "what!", "app[12", "x"]
    )
    assert (found, warnings) == ([1, 1, 1, 1, 2, 2, 2], ())
    assert topics_found(["a[\uff0c]b", "*"], ["a\uff0cb", "a,b"]) == ([1, 2], ())


@pytest.mark.parametrize("text, literal", [("app[1]", "app[[]1]"), ("[error]", "[[]error]"), ("a[0-9]b", "a[[]0-9]b")])
def test_a_pattern_in_brackets_that_could_be_meant_as_a_name_earns_a_warning(text, literal):
    (number, itself), (warning,) = topics_found([text], [text, text])[0], read(SLS_TOPIC_TO1=text).warnings
    assert (number, itself) == (None, None)
    assert warning.startswith("SLS_TOPIC_TO1: %r is a pattern" % text) and repr(literal) in warning
    assert topics_found([literal], [text]) == ([1], ())


@pytest.mark.parametrize("text", ["app[1]*", "[ab]?", "app[1", "[]", "[*]", "*"])
def test_other_patterns_earn_none(text):
    assert read(SLS_TOPIC_TO1=text).warnings == ()


def test_log_groups_without_a_topic_can_be_routed_by_themselves():
    assert topics_found(["[]", "*"], ["", "[]", "x"]) == ([1, 2, 2], ())
    assert topics_found(["a", "b, [] ", "?*"], ["", "a", "b", "c"]) == ([2, 1, 2, 3], ())


def test_a_range_that_makes_no_sense_is_refused_or_matches_nothing():
    """The older of the interpreters' fnmatch makes no regular expression of it, the newer one that never matches."""
    try:
        read(SLS_TOPIC_TO1="app[z-a]")
    except SettingsError as error:
        (problem,) = error.args
        assert problem.startswith("SLS_TOPIC_TO1: 'app[z-a]' is wrong")
    else:
        assert topics_found(["app[z-a]*"], ["appz", "appa", "app"])[0] == [None] * 3


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_work_without_settings(option):
    ended = run_program({}, option)
    assert (ended.returncode, ended.stderr) == (0, "")
    if option == "--version":
        assert ended.stdout == "dispatch_data.py %s\n" % dispatch_data.__version__
    else:
        for setting in (*dispatch_data.SOURCE_SETTINGS, *dispatch_data.TUNING_SETTINGS.values()):
            assert " %s (" % setting.variable in ended.stdout
        for setting in (dispatch_data.TARGET_LOGSTORE, dispatch_data.TARGET_TOPICS):
            assert " %s_TO<n> (" % setting.variable in ended.stdout


def test_an_unknown_argument_is_refused():
    ended = run_program({}, "--daemon")
    assert ended.returncode == 2
    assert "--daemon" in ended.stderr and "Traceback" not in ended.stderr
