"""The asv suite. asv imports this directory alone, as a package; the tables that it shares with the tools lie above it.

The directory is apart from the tools because asv imports every module beside the benchmarks, whatever they need.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
