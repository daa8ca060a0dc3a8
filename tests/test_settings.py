"""Settings: every mistake gets one clear line that names its variable, and shows no secret."""

import re
from datetime import datetime, timezone

import pytest
from copies import run_program

import dispatch_data
from dispatch_data import Routes, SettingsError, read_settings

SECRET = "Secret/key+0"
TOKEN = "Token/0"
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
    ({"SLS_PROJECT": "a/b"}, r"SLS_PROJECT: 'a/b' is wrong; right would be letters"),
    ({"SLS_LOGSTORE": "a b"}, r"SLS_LOGSTORE: 'a b' is wrong; right would be letters"),
    ({"SLS_CG": "a.b"}, r"SLS_CG: 'a.b' is wrong; right would be up to 64 letters"),
    ({"SLS_LOGSTORE_TO1": "a,b"}, r"SLS_LOGSTORE_TO1: 'a,b' is wrong; right would be letters"),
    ({"SLS_LOGSTORE_TO1": "source"}, r"SLS_LOGSTORE_TO1: project/source is the source itself"),
    ({"SLS_LOGSTORE_TO4": "rest"}, r"SLS_TOPIC_TO4 is missing: "),
    ({"SLS_TOPIC_TO5": "x"}, r"SLS_LOGSTORE_TO5 is missing: "),
    ({"SLS_PROJECT_TO5": "x", "SLS_TOPIC_TO5": "x"}, r"SLS_LOGSTORE_TO5 is missing: "),
    ({"SLS_TOPIC_TO1": " , ,"}, r"SLS_TOPIC_TO1: ', ,' is wrong; right would be topics separated by commas"),
    ({"SLS_LOGSTORE_TO2": "b", "SLS_TOPIC_TO2": "sql, nginx"}, r"SLS_TOPIC_TO2: 'nginx' is routed by SLS_TOPIC_TO1"),
    ({"SLS_AK_ID_TO": "other"}, r"SLS_AK_KEY_TO is missing: "),
    ({"SLS_AK_KEY_TO1": "other"}, r"SLS_AK_ID_TO1 is missing: "),
    ({"SLS_STS_TOKEN_TO1": TOKEN, "SLS_AK_KEY_TO1": SECRET}, r"SLS_AK_ID_TO1 is missing: "),
    ({"SLS_PROJECT_TO": "a/b"}, r"SLS_PROJECT_TO: 'a/b' is wrong"),
    ({"SLS_ENDPOINT_TO1": "a/b"}, r"SLS_ENDPOINT_TO1: 'a/b' is wrong"),
    ({"SLS_CURSOR_START": "yesterday"}, r"SLS_CURSOR_START: 'yesterday' is wrong; right would be begin, end, or"),
    ({"SLS_CURSOR_START": "2018-13-26"}, r"SLS_CURSOR_START: '2018-13-26' is wrong"),
    ({"SLS_HEARTBEAT_INTERVAL": "20s"}, r"SLS_HEARTBEAT_INTERVAL: '20s' is wrong; right would be whole seconds from 1"),
    ({"SLS_HEARTBEAT_INTERVAL": "0"}, r"SLS_HEARTBEAT_INTERVAL: '0' is wrong"),
    ({"SLS_HEARTBEAT_INTERVAL": "1.5"}, r"SLS_HEARTBEAT_INTERVAL: '1.5' is wrong"),
    ({"SLS_FETCH_INTERVAL": "nan"}, r"SLS_FETCH_INTERVAL: 'nan' is wrong; right would be seconds from 0.01 to 60"),
    ({"SLS_FETCH_INTERVAL": "-1"}, r"SLS_FETCH_INTERVAL: '-1' is wrong"),
    ({"SLS_WRITERS": "0"}, r"SLS_WRITERS: '0' is wrong; right would be a whole number from 1 to 64"),
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
    ({"SLS_ENDPOINT": "htps://cn-hangzhou.log.aliyuncs.com"}, r"SLS_ENDPOINT: 'htps://.*' is wrong"),
    ({"SLS_LOGSTORE_TO1": "../nginx"}, r"SLS_LOGSTORE_TO1: '../nginx' is wrong"),
    ({"SLS_PROJECT_TO": "a%2Fb"}, r"SLS_PROJECT_TO: 'a%2Fb' is wrong"),
    ({"SLS_CG": "a\nb"}, r"SLS_CG: 'a\\nb' is wrong"),
    ({"SLS_LOG_LEVEL": "LOUD"}, r"SLS_LOG_LEVEL: 'LOUD' is wrong; right would be DEBUG, INFO"),
]


@pytest.mark.parametrize(
    "changes, line",
    MISTAKES,
    ids=[" ".join(changes) + " " + str(number) for number, (changes, _) in enumerate(MISTAKES)],
)
def test_a_mistake_gets_one_line(changes, line):
    with pytest.raises(SettingsError) as caught:
        read(**changes)
    (problem,) = caught.value.problems
    assert re.match(line, problem), problem
    assert "\n" not in problem and SECRET not in problem and TOKEN not in problem


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
        ("SLS_HEARTBEAT", "SLS_HEARTBEAT_INTERVAL"),
        ("SLS_PROJEKT", "SLS_PROJECT"),
        ("SLS_ENDPONT_TO", "SLS_ENDPOINT_TO"),
        ("SLS_LOGSTORE_TO0", "SLS_LOGSTORE_TO"),
    ],
)
def test_an_unknown_name_earns_a_warning_with_the_nearest_known(name, nearest):
    (warning,) = read(**{name: "x"}).warnings
    assert warning.startswith(name + " is not a setting")
    assert nearest in warning


def test_no_warning_without_need():
    assert read(SLS_REGION_TO1="cn-beijing", SLS_PROJECT_TO="x", SLS_CURSOR_START="end").warnings == ()


def test_defaults():
    settings = read()
    assert settings[3:-1] == ("begin", 20, 0.2, 8, False, "", ".", "INFO")
    (target,) = settings.targets
    assert (target.number, target.topics) == (1, ("ngnix", "nginx"))
    assert target.place[:7] == settings.source._replace(logstore="nginx")[:7]
    settings = read(SLS_LOGSTORE_TO2="b", SLS_LOGSTORE_TO3="c")
    assert [target.topics for target in settings.targets] == [("ngnix", "nginx"), ("sql_audit",), ("click",)]


def test_each_target_takes_what_it_does_not_set_from_the_line_above():
    settings = read(
        SLS_LOGSTORE_TO2="b",
        SLS_LOGSTORE_TO30="c",
        SLS_TOPIC_TO30="x",
        SLS_STS_TOKEN=TOKEN,
        SLS_REGION="r",
        SLS_PROJECT_TO="p",
        SLS_AK_ID_TO="id-to",
        SLS_AK_KEY_TO="key-to",
        SLS_ENDPOINT_TO2="https://e2",
        SLS_REGION_TO2="r2",
        SLS_PROJECT_TO2="p2",
        SLS_AK_ID_TO30="id-30",
        SLS_AK_KEY_TO30="key-30",
        SLS_STS_TOKEN_TO30="token-30",
    )
    one, two, thirty = [target.place for target in settings.targets]
    assert one[:7] == (GOOD["SLS_ENDPOINT"], "id-to", "key-to", "", "r", "p", "nginx")
    assert two[:7] == ("https://e2", "id-to", "key-to", "", "r2", "p2", "b")
    assert thirty[:7] == (GOOD["SLS_ENDPOINT"], "id-30", "key-30", "token-30", "r", "p", "c")
    assert [two.names[name] for name in ("SLS_LOGSTORE", "SLS_PROJECT", "SLS_AK_KEY", "SLS_REGION")] == [
        "SLS_LOGSTORE_TO2",
        "SLS_PROJECT_TO2",
        "SLS_AK_KEY_TO",
        "SLS_REGION_TO2",
    ]
    assert (one.names["SLS_ENDPOINT"], one.names["SLS_STS_TOKEN"]) == ("SLS_ENDPOINT", "SLS_STS_TOKEN_TO")
    assert settings.source.security_token == TOKEN
    assert sorted(settings.secrets()) == sorted([SECRET, TOKEN, "key-to", "key-to", "key-30", "token-30"])


def test_values_may_have_space_around_them():
    assert read(SLS_PROJECT=" project \r", SLS_TOPIC_TO1=" a ,b").targets[0].topics == ("a", "b")


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
        ("2018-12-26 0:0:0", int(datetime(2018, 12, 26).timestamp())),
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
    find = Routes(settings.targets).find
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


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_work_without_settings(option):
    ended = run_program({}, option)
    assert (ended.returncode, ended.stderr) == (0, "")
    if option == "--version":
        assert ended.stdout == "dispatch_data.py %s\n" % dispatch_data.__version__
    else:
        for setting in (
            dispatch_data.PLACE_SETTINGS
            + dispatch_data.SOURCE_SETTINGS
            + dispatch_data.TARGET_SETTINGS
            + dispatch_data.TUNING_SETTINGS
        ):
            assert setting.name in ended.stdout


def test_an_unknown_argument_is_refused():
    ended = run_program({}, "--daemon")
    assert ended.returncode == 2
    assert "--daemon" in ended.stderr and "Traceback" not in ended.stderr
