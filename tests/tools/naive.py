"""The benchmark's baseline: a dispatcher as one writes it from the vendor's article and the SDK's examples.

It reads the same settings as dispatch_data.py. It parses every pull, looks every Topic up and puts every LogGroup by
itself, one after the other. All that the SDK can be told stays as the SDK has it: 1000 LogGroups a pull, 2 threads, a
look at the shards every 2 s unless SLS_FETCH_INTERVAL says otherwise. The latter two bound its MB/s and its latency,
not its CPU time. It tries nothing again.
"""

import functools
import os

from aliyun.log import LogClient
from aliyun.log.consumer import ConsumerProcessorBase, ConsumerWorker, LogHubConfig

ACCESS = tuple(os.environ["SLS_" + name] for name in ("ENDPOINT", "AK_ID", "AK_KEY"))
PROJECT = os.environ["SLS_PROJECT"]
TOPICS = {1: ("ngnix", "nginx"), 2: ("sql_audit",), 3: ("click",)}


class Dispatch(ConsumerProcessorBase):
    """Writes what one shard holds to the logstore of its Topic."""

    def __init__(self, write_by_topic):
        super().__init__()
        self.write_by_topic = write_by_topic

    def process(self, log_groups, check_point_tracker):
        for log_group in log_groups.LogGroups:
            write = self.write_by_topic.get(log_group.Topic)
            if write:
                write(log_group)
        check_point_tracker.save_check_point(True)


if __name__ == "__main__":
    client = LogClient(*ACCESS)
    writes = {
        topic: functools.partial(client.put_log_raw, PROJECT, os.environ["SLS_LOGSTORE_TO%d" % number])
        for number, topics in TOPICS.items()
        for topic in topics
    }
    group = os.environ["SLS_CG"]
    config = LogHubConfig(
        *ACCESS,
        PROJECT,
        os.environ["SLS_LOGSTORE"],
        group,
        "%s-%d" % (group, os.getpid()),
        data_fetch_interval=float(os.environ.get("SLS_FETCH_INTERVAL", 2)),
    )
    ConsumerWorker(Dispatch, config, args=(writes,)).start(join=True)
