"""An answer counts only if the service gave it: every call, with every sort of answer that is not the service's.

What stands between a copy and the service is played by tests/local_log_service/faults.py.
"""

import contextlib
import re
import secrets

import pytest
from assertions import (
    arrived_in_targets,
    assert_all_delivered_once,
    assert_delivered_once,
    assert_nothing_lost,
    puts_arrived,
)
from conftest import create_logstores
from harness import (
    GROUP,
    LIMIT,
    PROJECT,
    SOURCE,
    Copies,
    feed,
    group_shards,
    make_log_group,
    pulled_at_once,
    run_program,
    settings_for,
    wait_until_begun,
    wait_until_delivered,
)
from local_log_service import ForeignAnswer, LocalLogService, cursors, mangling

ANSWERS = {
    "empty": ForeignAnswer(200),
    "object": ForeignAnswer(200, {"Content-Type": "application/json"}, b"{}"),
    "list": ForeignAnswer(200, {"Content-Type": "application/json"}, b"[]"),
    "ok": ForeignAnswer(200, {"Content-Type": "application/json"}, b'{"status":"ok"}'),
    "null": ForeignAnswer(200, {}, b"null"),
    "maintenance page": ForeignAnswer(200, {"Content-Type": "text/html"}, b"<html>back soon</html>"),
    "portal": ForeignAnswer(302, {"Location": "http://portal.test/"}),
    "proxy asks who": ForeignAnswer(407),
    "too many": ForeignAnswer(429),
    "client closed": ForeignAnswer(499),
    "bad gateway": ForeignAnswer(502, {"Content-Type": "text/html"}, b"<html>bad gateway</html>"),
    "created": ForeignAnswer(201, request_id=True),
}
# With the mark of the service, but not in the form that the call must have.
FORMS = {
    "PutLogs": ForeignAnswer(200, {}, b"{}", request_id=True),
    "PullLogs": ForeignAnswer(200, {}, b"", request_id=True),
    "GetCursor": ForeignAnswer(200, {}, b'{"cursor": 1}', request_id=True),
    "ListShards": ForeignAnswer(200, {}, b"[1]", request_id=True),
    "HeartBeat": ForeignAnswer(200, {}, b'["0"]', request_id=True),
    "GetCheckPoint": ForeignAnswer(200, {}, b"[1]", request_id=True),
    "ListConsumerGroup": ForeignAnswer(200, {}, b"null", request_id=True),
}
RUNNING_CALLS = ("PutLogs", "PullLogs", "HeartBeat", "UpdateCheckPoint")
STARTING_CALLS = ("ListShards", "ListConsumerGroup", "GetCheckPoint", "CreateConsumerGroup", "GetCursor")
WAYS = {
    "closed after each answer": dict(close=True),
    "early hints": dict(interim=ForeignAnswer(103, {"Link": "</>"})),
    "stray second answer": dict(stray=ForeignAnswer(request_id=True)),
}
PULLS = {
    "another size": mangling.wrong_raw_size,
    "undecodable": mangling.undecodable,
    "unknown compression": mangling.unknown_compression,
}
# What a pull announces, brings and moves the cursor by do not agree.
DISAGREEING = {
    "no size": mangling.announcing(bodyrawsize="0"),
    "neither size nor count": mangling.announcing(bodyrawsize="0", count="0"),
    "a size below nothing": mangling.announcing(bodyrawsize="-1"),
    "a size beyond all measure": mangling.announcing(bodyrawsize="2000000000"),
    "a size that is none": mangling.announcing(bodyrawsize="large"),
    "no count": mangling.announcing(count="0"),
    "a count that is none": mangling.announcing(count="many"),
    "half of the LogGroups": mangling.bringing(lambda groups: groups[: len(groups) // 2]),
    "none of the LogGroups": mangling.bringing(lambda _: []),
    "a LogGroup twice": mangling.bringing(lambda groups: groups + groups[:1]),
    "a LogGroupList without its end": mangling.broken_off,
    "a cursor that is none": mangling.announcing(cursor="MTAwM"),
    "a cursor of no number": mangling.announcing(cursor="LTEwMDA="),
    "two cursors": mangling.announcing(Cursor="MTAwMA=="),
    "an empty cursor": mangling.announcing(cursor=""),
    "a cursor too near": lambda answer, call: mangling.announcing(cursor=cursor_after(call.query["cursor"], 1))(
        answer, call
    ),
}


def cursor_after(cursor, count):
    return cursors.encode(cursors.decode(cursor) + count)


def wait_for_a_word(service, copy, fault, words="NotTheService"):
    service.wait_for(lambda: fault.hits >= 3 and words in copy.stderr(), LIMIT, "tries, and a word about it")


@pytest.mark.parametrize("action", RUNNING_CALLS)
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=list(ANSWERS))
def test_what_something_in_between_says_counts_for_nothing(service, copies, action, answer):
    copy = copies.start()
    wait_until_begun(service)
    with service.add_fault(action, answer=answer) as fault:
        feed(service, 40)
        wait_for_a_word(service, copy, fault)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "Traceback" not in copy.stderr()


@pytest.mark.parametrize("status", [200, 403])
def test_an_answer_too_deep_to_be_read_blames_the_answer(service, copies, status):
    """And its connection is not among the idle ones when it is closed."""
    copy = copies.start()
    wait_until_begun(service)
    answer = ForeignAnswer(status, {}, b"[" * 200000, request_id=True)
    with service.add_fault("PutLogs", answer=answer) as fault:
        feed(service, 40)
        wait_for_a_word(service, copy, fault)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert not re.search("Traceback|RecursionError|LocalFailure", copy.log())


@pytest.mark.parametrize("action", STARTING_CALLS)
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=list(ANSWERS))
def test_a_start_waits_until_the_service_answers(service, copies, action, answer):
    feed(service, 20)
    with service.add_fault(action, answer=answer) as fault:
        copy = copies.start()
        service.wait_for(lambda: fault.hits >= 2 and "NotTheService" in copy.stderr(), LIMIT, "tries, and a word")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


@pytest.mark.parametrize("action", list(FORMS))
def test_a_success_has_the_form_that_its_call_must_have(service, copies, action):
    feed(service, 20)
    with service.add_fault(action, answer=FORMS[action]) as fault:
        copy = copies.start()
        service.wait_for(lambda: fault.hits >= 2 and "NotTheService" in copy.stderr(), LIMIT, "tries, and a word")
    wait_until_delivered(service)
    assert_all_delivered_once(service)


@pytest.mark.parametrize("mangle", PULLS.values(), ids=list(PULLS))
def test_a_pull_counts_only_as_it_was_announced(service, copies, mangle):
    copy = copies.start()
    wait_until_begun(service)
    with service.add_fault("PullLogs", mangle=mangle) as fault:
        feed(service, 40)
        service.wait_for(lambda: fault.hits >= 3 and "a pull failed" in copy.stderr(), LIMIT, "tries, and a word")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "Traceback" not in copy.stderr()


@pytest.mark.parametrize("mangle", DISAGREEING.values(), ids=list(DISAGREEING))
def test_a_pull_whose_parts_disagree_delivers_nothing_and_skips_nothing(service, copies, mangle):
    """Whole batches: a pull of one LogGroup leaves nothing to disagree about. It is told, once, and pulled again."""
    copy = copies.start()
    wait_until_begun(service)
    with service.add_fault("PullLogs", mangle=mangle) as fault:
        with service.add_fault("PullLogs", hold=True) as held:
            service.wait_for(lambda: held.hits >= 4, LIMIT, "no pull of before the fault under way")
            feed(service, 80)
        hits = fault.hits
        service.wait_for(
            lambda: "UnreadablePull" in copy.stderr() and fault.hits >= hits + 8, LIMIT, "tries, and a word"
        )
        assert puts_arrived(service) == 0
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    told = [line for line in copy.stderr().splitlines() if "UnreadablePull" in line]
    assert len(told) <= 3 and "Traceback" not in copy.stderr()


def test_a_pull_without_its_count_delivers_nothing_and_skips_nothing(service, copies):
    copy = copies.start()
    wait_until_begun(service)
    with service.add_fault("PullLogs", mangle=mangling.without("x-log-count")) as fault:
        feed(service, 40)
        wait_for_a_word(service, copy, fault)
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def in_chunks(answer, _):
    headers = {name: text for name, text in answer.headers.items() if name.lower() != "content-length"}
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(answer.body), answer.body)
    return answer._replace(headers={**headers, "Transfer-Encoding": "chunked"}, body=chunk) if answer.body else answer


@pytest.mark.parametrize("mangle", [None, in_chunks], ids=["", "in chunks"])
def test_a_pull_too_large_to_be_believed_is_asked_for_less(service, copies, mangle):
    """The service has limits of its own, but nowhere says how many bytes a pull may bring. What can be compressed to
    little is known by the header of its raw size alone, where a proxy sends it in chunks."""
    source = secrets.token_hex(150000) if not mangle else ""
    copy = copies.start(constants={"MAX_PULL_BYTES": 10**6, "ShardConsumer.PULL_BYTES": 5 * 10**5})
    wait_until_begun(service)
    log_groups = [make_log_group("click", 1, Source=source or "x" * 300000 + str(number)) for number in range(20)]
    with contextlib.ExitStack() as faults:
        if mangle:
            faults.enter_context(service.add_fault("PullLogs", mangle=mangle))
        with pulled_at_once(service):  # five of each shard, by what LogGroups are taken to have
            service.put(PROJECT, SOURCE, log_groups)
        wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "UnreadablePull" not in copy.stderr() and "NotTheService" not in copy.stderr()


def test_a_pull_of_nothing_may_be_the_lz4_of_nothing(service, copies):
    """One byte: whether the service compresses nothing, too, nobody says."""

    def compress_nothing(answer, call):
        headers = {**answer.headers, "x-log-compresstype": "lz4"}
        return answer if answer.body else answer._replace(body=b"\0", headers=headers)

    with service.add_fault("PullLogs", mangle=compress_nothing) as fault:
        copy = copies.start()
        wait_until_begun(service)
        feed(service, 40)
        wait_until_delivered(service)
        hits = fault.hits
        service.wait_for(lambda: fault.hits >= hits + 8, LIMIT, "pulls that bring nothing")
    assert_all_delivered_once(service)
    assert "UnreadablePull" not in copy.stderr()


CUT_HEADS = {
    "PullLogs": "x-log-cursor",
    "PutLogs": "x-log-requestid",
    "HeartBeat": "x-log-requestid",
    "UpdateCheckPoint": "x-log-requestid",
}


@pytest.mark.parametrize("action, name", CUT_HEADS.items(), ids=list(CUT_HEADS))
def test_a_head_that_ends_before_its_blank_line_is_none(service, copies, action, name):
    copy = copies.start()
    wait_until_begun(service)
    with service.add_fault(action, cut_head=name) as fault:
        feed(service, 40)
        wait_for_a_word(service, copy, fault, "ends within its head")
    wait_until_delivered(service)
    if action == "PutLogs":  # each was taken, and nobody could tell
        assert_nothing_lost(service, most_repeated=fault.hits * 40 * 5)
    else:
        assert_all_delivered_once(service)
    assert "made again" not in copy.stderr() and "Traceback" not in copy.stderr()


ENDLESS = {
    "a body": dict(endless="chunks"),
    "what comes before an answer": dict(endless="interims"),
    "an error": dict(endless="chunks", status=503, code="ServerBusy"),
    "a page": dict(endless="chunks", answer=ForeignAnswer(403, {"Content-Type": "text/html"})),
    "what is announced": dict(answer=ForeignAnswer(200, {"Content-Length": "900000000"}, b"{", request_id=True)),
}


@pytest.mark.parametrize("effects", ENDLESS.values(), ids=list(ENDLESS))
@pytest.mark.parametrize("action", RUNNING_CALLS)
def test_an_answer_without_end_is_given_up(service, copies, action, effects):
    """In memory it would be as large as the line is fast. A put may be repeated, for nobody could tell it was taken."""
    copy = copies.start(constants={"MAX_PULL_BYTES": 3000000})
    wait_until_begun(service)
    with service.add_fault(action, **effects) as fault:
        feed(service, 40)
        wait_for_a_word(service, copy, fault, "or without end")
    wait_until_delivered(service)
    taken = action == "PutLogs" and effects in (ENDLESS["a body"], ENDLESS["what comes before an answer"])
    assert_nothing_lost(service, most_repeated=fault.hits * 40 * 5 if taken else 0)
    assert "Traceback" not in copy.stderr()


UNREADABLE_CHECKPOINTS = {"cut off": "MTAwM", "of another kind": "1/2/3", "no number": "LTEwMDA="}


@pytest.mark.parametrize("text", UNREADABLE_CHECKPOINTS.values(), ids=list(UNREADABLE_CHECKPOINTS))
def test_a_saved_checkpoint_that_is_no_cursor_is_named_and_blames_no_logstore(service, copies, text):
    """The shard waits, the others go on, and once somebody has set a cursor it does too."""
    first = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    assert first.stop() == 0
    with service.add_fault("GetCheckPoint", mangle=mangling.checkpoints(checkpoint=text, consumer="other")):
        copy = copies.start(constants={"LogThrottle.FIRST": 1e4})  # one line of each kind
        feed(service, 40)
        service.wait_for(
            lambda: [shard["next"] for shard in group_shards(service).values()] == [10, 20, 20, 20], LIMIT, "the others"
        )
        service.wait_for(lambda: "a shard can't begin yet" in copy.stderr(), LIMIT, "a word about shard 0")
        said = (
            run_program(settings_for(service), "--check").stdout + run_program(settings_for(service), "--status").stdout
        )
    (line,) = [line for line in copy.stderr().splitlines() if "a shard can't begin yet" in line]
    assert " ERROR " in line and "UnreadableCheckPoint" in line and "shard 0 is no cursor: %s" % text in line
    assert "made again" not in copy.stderr()
    assert "shard 0 is no cursor: %s" % text in said and "  no cursor  " in said
    wait_until_delivered(service)
    assert_all_delivered_once(service)


ODD_CURSORS = {"cut off": "MTAwM", "no number": "LTEwMDA=", "empty": ""}


@pytest.mark.parametrize("cursor", ODD_CURSORS.values(), ids=list(ODD_CURSORS))
def test_a_group_does_not_begin_at_a_cursor_that_is_none(service, copies, cursor):
    answer = ForeignAnswer(200, {}, b'{"cursor": "%s"}' % cursor.encode(), request_id=True)
    feed(service, 20)
    with service.add_fault("GetCursor", answer=answer) as fault:
        copy = copies.start()
        wait_for_a_word(service, copy, fault)
        assert not any(shard["checkpoint"] for shard in group_shards(service).values())
    wait_until_delivered(service)
    assert_all_delivered_once(service)


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_a_strange_way_to_answer_changes_nothing(service, copies, way):
    """A connection that was closed while it was idle gets a fresh try at once, which is no failure."""
    with service.add_fault("*", **way) as fault:
        copies.start()
        feed(service, 40)
        wait_until_delivered(service)
        feed(service, 40)
        wait_until_delivered(service)
        assert fault.hits
    assert_all_delivered_once(service)


def without_looks_at_what_is_idle(program):
    """The loop closes an idle connection over which something comes, before a put would find it."""
    program.PutLoop.close_idle = lambda *_: None


def test_a_stray_answer_is_not_taken_for_that_of_the_next_put(service, copies):
    """An answer 200 lies unread on the kept connection when the next put is refused there."""
    copies.start(patch=without_looks_at_what_is_idle)
    wait_until_begun(service)
    stray = dict(stray=ForeignAnswer(request_id=True), stray_pause=0.001)  # in a segment of its own
    with service.add_fault("PutLogs", status=403, code="WriteQuotaExceed", share=0.5) as refused:
        with service.add_fault("PutLogs", **stray):
            for _ in range(10):
                feed(service, 1, topics=("nginx",))
                wait_until_delivered(service)
        assert refused.hits > 3
    assert_all_delivered_once(service)


def test_the_answer_to_an_earlier_pull_leads_nobody_back(tmp_path):
    """One shard: with the answer that another shard was given, nobody could tell."""
    with LocalLogService() as service, Copies(service, tmp_path) as copies:
        create_logstores(service, shard_count=1)
        copy = copies.start()
        service.wait_for(lambda: service.calls("PullLogs") > 0, LIMIT, "a copy that pulls")
        with service.add_fault("PullLogs", mangle=mangling.Earlier(), share=0.7):
            for _ in range(5):
                feed(service, 8)
                service.wait_for(lambda: "another pull" in copy.stderr(), LIMIT, "a word about it")
                wait_until_delivered(service)
        assert_all_delivered_once(service)


def test_answers_cut_short_are_not_believed(service, copies):
    with service.add_fault("PullLogs", cut_short=10, share=0.5) as fault:
        copies.start()
        feed(service, 80)
        wait_until_delivered(service)
        assert fault.hits
    assert_all_delivered_once(service)


def test_an_answer_that_trickles_for_ever_ends(service, copies):
    """Each byte is in time; the whole is not."""
    copy = copies.start(constants={"RESPONSE_TIMEOUT": 1, "MAX_RESPONSE_TIMEOUT": 1})
    wait_until_begun(service)
    with service.add_fault("PutLogs", trickle=0.2) as fault:
        feed(service, 8)
        service.wait_for(lambda: fault.hits >= 3 and "NoAnswer" in copy.stderr(), LIMIT, "tries, and a word about it")
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=puts_arrived(service) * 5)  # each had arrived when its time was up


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=list(ANSWERS))
@pytest.mark.parametrize("option", ["--check", "--status"])
def test_check_and_status_say_at_once_that_it_is_not_the_service(service, option, answer):
    service.client().create_consumer_group(PROJECT, SOURCE, GROUP, 20)
    with service.add_fault("*", answer=answer):
        ended = run_program(settings_for(service), option)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1
    assert "NotTheService" in said and "SLS_ENDPOINT" in said and "proxy" in said
    assert "fine" not in said and "Traceback" not in said


# ---- what the codes mean

REFUSED = {
    "too large": dict(status=413, code="PostBodyTooLarge"),
    "a gateway's 413": dict(answer=ForeignAnswer(413, {"Content-Type": "text/html"}, b"<html>too large</html>")),
    "too old": dict(status=499, code="PostBodyInvalid"),
    "a key": dict(status=400, code="InvalidKey"),
    "an encoding": dict(status=400, code="InvalidEncoding"),
    "a time": dict(status=400, code="InvalidTimestamp"),
}


@pytest.mark.parametrize("refusal", REFUSED.values(), ids=list(REFUSED))
def test_what_a_target_refuses_is_split_and_kept_while_it_takes_no_put_at_all(service, copies, tmp_path, refusal):
    directory = tmp_path / "rejected"
    directory.mkdir()
    copies.start(SLS_REJECTED_DIR=str(directory))
    wait_until_begun(service)
    with service.add_fault("PutLogs", logstore="click", **refusal) as fault:
        feed(service, 8, topics=("click",), shard=0)
        service.wait_for(lambda: fault.hits > 8 * 3, LIMIT, "each LogGroup refused by itself, three times and more")
        assert list(directory.iterdir()) == [], "a target that takes no put at all does not blame the LogGroups"
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_one_that_is_too_large_is_set_aside_and_what_was_joined_with_it_is_not(tmp_path):
    directory = tmp_path / "rejected"
    directory.mkdir()
    with LocalLogService(max_put_bytes=20 * 1000) as service:
        create_logstores(service)
        with Copies(service, tmp_path) as copies:
            large = make_log_group("click", 2000)
            small = [make_log_group("click", 50) for _ in range(40)]
            service.put(PROJECT, SOURCE, small[:20], shard=0)
            service.put(PROJECT, SOURCE, [large], shard=0)
            service.put(PROJECT, SOURCE, small[20:], shard=0)
            copies.start(SLS_REJECTED_DIR=str(directory), constants={"UNDISPUTED_BYTES": 20 * 1000})
            wait_until_delivered(service)
        assert [path.read_bytes() for path in directory.iterdir()] == [large]
        assert_delivered_once(small, arrived_in_targets(service))


def test_a_systematic_refusal_does_not_empty_the_source_into_the_directory(service, copies, tmp_path):
    directory = tmp_path / "rejected"
    directory.mkdir()
    copies.start(SLS_REJECTED_DIR=str(directory))
    wait_until_begun(service)
    with service.add_fault("PutLogs", status=400, code="ParameterInvalid") as fault:
        feed(service, 62)
        service.wait_for(lambda: fault.hits > 62 * 3, LIMIT, "every LogGroup refused again and again")
        assert list(directory.iterdir()) == []
    wait_until_delivered(service)
    assert_all_delivered_once(service)


UNAUTHORIZED = {
    "AccessKeyId not found: local-id": ("wrong", "SLS_AK_ID must be a key that exists"),
    "AccessKeyId is disabled: local-id": ("wrong", "SLS_AK_ID is disabled"),
    "The security token has expired": ("wrong", "SLS_STS_TOKEN"),
    "The security token you provided is invalid": ("wrong", "SLS_STS_TOKEN"),
    "The service has been forbidden": ("wrong", "arrears"),
    "denied by sts or ram, action: log:ListShards": ("could not verify", "may not look"),
}
# As the service puts it, with a resource: names that are nobody's fault.
DENIED = "denied by sts or ram, action: log:ListShards, resource: acs:log:cn-x:1234567890123456:project/%s/logstore/%s"
for names in (("test-project", "llm-token-logs"), ("expired-orders", "click"), ("forbidden-city", "click")):
    UNAUTHORIZED[DENIED % names] = ("could not verify", "may not look")


@pytest.mark.parametrize("message", list(UNAUTHORIZED))
def test_unauthorized_is_told_apart_by_its_message(service, message):
    verdict, advice = UNAUTHORIZED[message]
    body = ('{"errorCode": "Unauthorized", "errorMessage": "%s"}' % message).encode()
    answer = ForeignAnswer(401, {"Content-Type": "application/json"}, body, request_id=True)
    with service.add_fault("ListShards", logstore="click", answer=answer):
        ended = run_program(settings_for(service), "--check")
    (line,) = [line for line in ended.stdout.splitlines() if "click" in line and " takes " not in line]
    assert re.search(r"\b%s: " % verdict, line) and advice in line and message in line
    assert ended.returncode == (verdict == "wrong")


def test_a_log_group_without_logs_is_not_put(service, copies):
    """A target may answer 500 to it for ever."""
    service.put(PROJECT, SOURCE, [b"\x1a\x05nginx"] * 3)
    feed(service, 8)
    copy = copies.start()
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert all(len(entry.parse().Logs) for entry in service.ledger(PROJECT, "nginx"))
    assert copy.stop() == 0
    assert "empty_groups=3" in copy.log()
