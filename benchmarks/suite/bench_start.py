"""What a process pays before its first result: the import, and the first call, compiled or from the cache."""

import os
import statistics
import subprocess
import sys
import tempfile

_IMPORT = """
import time
begin = time.perf_counter()
import fastloss
print(time.perf_counter() - begin)
"""
_FIRST_CALL = """
import time
import numpy as np
import fastloss
logits = np.zeros((4, 10), np.float32)
begin = time.perf_counter()
fastloss.cross_entropy(logits, [0, 1, 2, 3])
print(time.perf_counter() - begin)
"""


def _seconds(code, cache=None):
    """What a new process prints."""
    environment = dict(os.environ) | ({"FASTLOSS_CACHE_DIR": cache} if cache else {})
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


class Import:
    """`import fastloss`, NumPy's share included."""

    tiny = False

    def track_seconds(self):
        return statistics.median(_seconds(_IMPORT) for _ in range(1 if self.tiny else 5))

    track_seconds.unit = "s"


class FirstCall:
    """The first small call of a process, with an empty cache and with its code in the cache."""

    tiny = False
    timeout = 300

    def track_cold(self):
        with tempfile.TemporaryDirectory() as empty:
            return _seconds(_FIRST_CALL, None if self.tiny else empty)

    def track_warm(self):
        _seconds(_FIRST_CALL)  # fills the cache, if this is the first time
        return statistics.median(_seconds(_FIRST_CALL) for _ in range(1 if self.tiny else 3))

    track_cold.unit = track_warm.unit = "s"
