"""What writes logs in Python, one after the other, into one logstore; for test_foreign_clients.py.

Arguments: the endpoint, a project, a logstore, and how often. The environment leads to the service, as http_proxy.
"""

import sys
import time

import aliyun_log_fastpb
from alibabacloud_sls20201230 import models
from alibabacloud_sls20201230.client import Client
from alibabacloud_tea_openapi.models import Config
from alibabacloud_tea_util.models import RuntimeOptions
from aliyun.log import LogClient, LogItem, PutLogsRequest  # release 0.8.0
from aliyun_log_producer import Producer, ProducerConfig

endpoint, project, logstore, rounds = sys.argv[1], sys.argv[2], sys.argv[3], range(int(sys.argv[4]))
TOPICS = ["nginx", "sql_audit", "click", ""]
now = int(time.time())


class Serialized:
    def __init__(self, data):
        self.data = data

    def SerializeToString(self):
        return self.data


failures = []
for compression in ("zstd", "lz4"):
    config = ProducerConfig(
        endpoint=endpoint,
        access_key_id="local-id",
        access_key_secret="local-secret",
        compression=compression,
        linger=0.05,
    )
    with Producer(config) as producer:
        writer = producer.writer(project, logstore)
        for number in rounds:
            for topic in TOPICS:
                log = {"producer": "%s %d %s" % (compression, number, topic), "": "täglich"}
                writer.send(log, time=now, topic=topic, source="10.0.0.1", on_delivery=failures.append)
        producer.flush()
assert len(failures) == 2 * len(TOPICS) * len(rounds) and not any(failures), failures

old = LogClient(endpoint, "local-id", "local-secret")
for number in rounds:
    for topic in TOPICS:
        item = LogItem(now, [("SDK 0.8.0", "%d %s" % (number, topic))])
        old.put_logs(PutLogsRequest(project, logstore, topic or None, logitems=[item] * 2))
        log = {"Time": now, "TimeNs": number, "Contents": [{"Key": "fastpb", "Value": b"%d \xff" % number}]}
        tags = [{"Key": "__pack_id__", "Value": "F-%d" % number}]
        group = {"LogItems": [log], "LogTags": tags, "Topic": topic, "Source": ""}
        old.put_log_raw(project, logstore, Serialized(aliyun_log_fastpb.serialize_log_group_raw(group)))

for version in ("v1", "v4"):
    openapi = Client(
        Config(
            access_key_id="local-id",
            access_key_secret="local-secret",
            endpoint=endpoint[len("http://") :],
            protocol="http",
            region_id="local",
            signature_version=version,
        )
    )
    for compression in ("zstd", "lz4", "deflate"):
        headers = models.PutLogsHeaders(x_log_compresstype=compression)
        for topic in TOPICS:
            content = models.LogContent(key="OpenAPI", value="%s %s %s" % (version, compression, topic))
            group = models.LogGroup(
                topic=topic or None,
                source="s",
                log_items=[models.LogItem(time=now, contents=[content])],
                log_tags=[models.LogTag(key="k", value="v")],
            )
            request = models.PutLogsRequest(body=group)
            openapi.put_logs_with_options(project, logstore, request, headers, RuntimeOptions())
print("written")
