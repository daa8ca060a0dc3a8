"""Runs calls of the vendor's OpenAPI SDK for Python, alibabacloud-sls20201230, for test_foreign_clients.py.

The first argument is a JSON document: what to make the client of, the address of the proxy that leads to the service,
and the calls, each [method, arguments...]. A {"name of a model": {fields}} among the arguments is that model. Prints a
JSON list with {"answer": ...} or {"error": text} for each call.
"""

import json
import sys

from alibabacloud_sls20201230 import models
from alibabacloud_sls20201230.client import Client
from alibabacloud_tea_openapi.models import Config


def revive(document):
    (name,) = document if len(document) == 1 else [""]
    return getattr(models, name)(**document[name]) if hasattr(models, name) else document


settings, proxy, calls = json.loads(sys.argv[1], object_hook=revive)
client = Client(Config(http_proxy=proxy, protocol="http", **settings))
outcomes = []
for method, *arguments in calls:
    try:
        outcomes.append({"answer": getattr(client, method)(*arguments).to_map().get("body")})
    except Exception as error:
        outcomes.append({"error": str(error)})
print(json.dumps(outcomes))
