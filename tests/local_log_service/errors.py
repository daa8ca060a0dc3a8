"""The errors of the Log Service that this double answers with.

Statuses, codes and the gist of the messages are those of the vendor's public API reference
("Error codes" and the page of each API).
"""

import json
from typing import Dict, Optional, Tuple

#: code -> (HTTP status, message). BadGateway, BadRequest and InvalidAPI are not documented: they stand where the
#: documentation names no code.
DOCUMENTED: Dict[str, Tuple[int, str]] = {
    "BadRequest": (400, "the request is no HTTP"),
    "ConsumerGroupAlreadyExist": (400, "consumer group already exist"),
    "InvalidEncoding": (400, "Non-UTF8 characters are in logs"),
    "InvalidKey": (400, "Invalid keys are in logs"),
    "InvalidSignatureMethod": (400, "signature method is unsupported"),
    "InvalidTimestamp": (400, "Invalid timestamps are in logs"),
    "ConsumerNotMatch": (400, "consumer not match"),
    "IndexConfigNotExist": (400, "logstore without index config"),
    "InvalidBodyRawSize": (400, "x-log-bodyrawsize is invalid"),
    "InvalidCompressType": (400, "x-log-compresstype is unsupported"),
    "InvalidCursor": (400, "invalid cursor"),
    "InvalidHost": (400, "Host header is invalid"),
    "InvalidRequestTime": (400, "Request time does not follow the specification"),
    "InvalidShardCheckPoint": (400, "shard checkpoint not encoded by base64"),
    "InvalidTimeRange": (400, "request time range is invalid"),
    "JsonInfoInvalid": (400, "consumerGroup or timeout is of error format"),
    "LogStoreAlreadyExist": (400, "logstore already exists"),
    "LogStoreInfoInvalid": (400, "logstore info is invalid"),
    "MissingBodyRawSize": (400, "x-log-bodyrawsize does not exist in header when it is necessary"),
    "MissingParameter": (400, "a required parameter is missing"),
    "MissingSignatureMethod": (400, "x-log-signaturemethod does not exist in http header"),
    "NotExistConsumerWithBody": (400, "non-exist consumer with non-empty body of heartbeat message"),
    "ParameterInvalid": (400, "a parameter is invalid"),
    "PostBodyInvalid": (400, "Protobuf content cannot parse"),
    "PostBodyUncompressError": (400, "Failed to decompress POST body"),
    "ProjectAlreadyExist": (400, "Project already exist"),
    "RequestTimeExpired": (400, "Request time has been expired"),
    "RequestTimeTooSkewed": (400, "Request time exceeds server time more than 15 minutes"),
    "ShardNotExist": (400, "shard does not exist"),  # 404 from UpdateCheckPoint alone
    "InvalidAccessKeyId": (401, "The access key id you provided is invalid"),
    "ProjectForbidden": (401, "The project has been forbidden"),
    "SignatureNotMatch": (401, "signature not matched"),
    "Unauthorized": (401, "The AccessKeyId is unauthorized"),
    "ConsumerGroupQuotaExceed": (403, "consumer group count quota exceed"),
    "ExceedQuota": (403, "quota exceed"),
    "MetaOperationQpsLimitExceeded": (403, "Meta operation qps limit exceeded"),
    "ReadQuotaExceed": (403, "Project read quota exceed"),
    "ShardReadQuotaExceed": (403, "Shard read quota exceed"),
    "ShardWriteQuotaExceed": (403, "Shard write quota exceed"),
    "WriteQuotaExceed": (403, "Project write quota exceed"),
    "ConsumerGroupNotExist": (404, "consumer group not exist"),
    # Consumer libraries look for the second spelling, the documentation has the first.
    "ConsumerNotExist": (404, "consumer not exist in the consumer group"),
    "ConsumerNotExsit": (404, "consumer not exist in the consumer group"),
    "InvalidAPI": (404, "no such API"),
    "LogStoreNotExist": (404, "logstore does not exist"),
    "ProjectNotExist": (404, "The Project does not exist"),
    "PostBodyTooLarge": (413, "the body exceeds the maximum size"),
    "InternalServerError": (500, "Internal server error"),
    "BadGateway": (502, "bad gateway"),
    "ServerBusy": (503, "the server is busy, please try again later"),
}

_CODE_OF_BARE_STATUS = {
    401: "Unauthorized",
    403: "WriteQuotaExceed",
    413: "PostBodyTooLarge",
    502: "BadGateway",
    503: "ServerBusy",
}


class ServiceError(Exception):
    """An error answer: HTTP ``status``, ``code`` ("errorCode") and ``message`` ("errorMessage")."""

    def __init__(self, code: str, message: Optional[str] = None, status: Optional[int] = None) -> None:
        """Take what is not given of a documented ``code`` from ``DOCUMENTED``.

        An undocumented code needs a ``status``; its message is then the code itself.
        """
        if code in DOCUMENTED:
            documented_status, documented_message = DOCUMENTED[code]
        elif status is not None:
            documented_status, documented_message = status, code
        else:
            raise ValueError("the code {!r} is not a documented one, so it needs a status".format(code))
        self.status = documented_status if status is None else status
        self.code = code
        self.message = documented_message if message is None else message
        super().__init__("{} {}: {}".format(self.status, self.code, self.message))

    @classmethod
    def of_status(cls, status: int, message: Optional[str] = None) -> "ServiceError":
        """Return the error that goes with a bare HTTP ``status``."""
        if status >= 500:
            code = _CODE_OF_BARE_STATUS.get(status, "InternalServerError")
        else:
            code = _CODE_OF_BARE_STATUS.get(status, "ParameterInvalid")
        return cls(code, message, status)

    def body(self) -> bytes:
        """Return the JSON document that the service sends as the answer's body."""
        return json.dumps({"errorCode": self.code, "errorMessage": self.message}).encode("ascii")
