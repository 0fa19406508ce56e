"""The asv suite. asv imports this directory alone, as a package; the tables that it shares with the tools lie above it.

The directory is apart from the tools because asv imports every module beside the benchmarks, whatever they need.
"""

import contextlib
import sys
from pathlib import Path

# asv forks the process of each benchmark from one that has imported the suite: what is imported here is imported once.
with contextlib.suppress(ImportError):
    import numba  # noqa: F401

sys.path.append(str(Path(__file__).resolve().parents[1]))
