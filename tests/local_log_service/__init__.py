"""A local, in-memory double of Alibaba Cloud Simple Log Service for tests and demonstrations.

It speaks the service's own HTTP protocol, signatures included, so that the vendor's SDK can be used against it
unchanged. It keeps everything in memory and listens on the loopback interface only.

README.md, beside this file, says call by call how far to trust it, and what it was held against.
"""

import sys

try:
    from .faults import Fault, ForeignAnswer
    from .quotas import Quotas
    from .service import LocalLogService
    from .state import Entry
except ModuleNotFoundError as missing:
    if sys.argv[0] != "-m":  # as `python -m` has it while it looks for the package
        raise
    needed = "pip install -r requirements.txt -r tests/requirements.txt"
    sys.exit("tests.local_log_service: %s; install what it needs: %s" % (missing, needed))

__all__ = ["Entry", "Fault", "ForeignAnswer", "LocalLogService", "Quotas"]
