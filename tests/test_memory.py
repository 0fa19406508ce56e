"""Nothing of the size of the input is allocated: the tool that measures it is run on the layouts that tempt to copy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "benchmarks" / "memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "case",
    ["(N, C)", "(N, C) transposed", "(N, C, H, W)", "(N, C, H, W), channels last", "(N, C) big-endian", "softmax"],
)
def test_peak_memory_beyond_the_input_is_small(case):
    command = [sys.executable, str(TOOL), "--case", case]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert measured["input_mib"] > 180
    assert measured["peak_mib"] <= measured["bound_mib"]
    if case != "softmax":
        assert measured["bound_mib"] == 8
