"""NUMBA_BOUNDSCHECK=1: every access of the vectors is checked, so that a run of the tests with it proves something.

This file is also the script that a process with the checks runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np


def main():
    from numba import njit

    from fastloss._kernels import _simd as simd

    one, wide = np.float32(1), np.int64(1)
    floats, integers, data = np.zeros(40, np.float32), np.zeros(40, np.int64), np.zeros(40, np.uint8)
    offsets = np.zeros(40, np.int64)

    @njit
    def all_of(what, i, floats, integers, data, offsets):
        if what == 0:
            return np.float64(simd.tree_sum(simd.load(floats, i, one)))
        if what == 1:
            return np.float64(simd.load_one(floats, i, one))
        if what == 2:
            simd.store(floats, i, simd.splat(one))
        if what == 3:
            simd.copy(floats, i, floats, 0, one)
        if what == 4:
            simd.copy(floats, 0, floats, i, one)
        if what == 5:
            return np.float64(simd.tree_sum(simd.load_columns(floats, offsets, 0, i, one)[0]))
        if what == 6:
            return np.float64(simd.tree_sum(simd.load_columns(floats, offsets, i, 0, one)[0]))
        if what == 7:
            return np.float64(simd.load_integer(data, i, wide))
        if what == 8:
            return np.float64(simd.tree_sum(simd.load_integers(integers, i, wide)))
        if what == 9:
            return np.float64(simd.load_target(data, i, 3))
        if what == 10:
            return np.float64(simd.tree_sum(simd.load_targets(integers, i, 3)))
        if what == 11:
            return np.float64(simd.tree_sum(simd.load_pairs(floats, i, one)[1]))
        ones = simd.splat(one)
        if what == 12:
            simd.store_columns(floats, offsets, 0, i, ones, ones, ones, ones)
        if what == 13:
            simd.store_columns(floats, offsets, i, 0, ones, ones, ones, ones)
        return 0.0

    # The last index that is inside: 16 lanes of 40 elements; one element; 4 columns; 8 bytes; 8 integers of 320 bytes;
    # 16 pairs.
    for what, last in enumerate((24, 39, 24, 24, 24, 36, 24, 32, 256, 32, 256, 8, 36, 24)):
        for i in (0, last):
            all_of(what, i, floats, integers, data, offsets)
        for i in (-1, last + 1):
            try:
                all_of(what, i, floats, integers, data, offsets)
            except IndexError:
                continue
            raise AssertionError((what, i))
    print("all checked")


def test_every_access_is_checked():
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "all checked\n")


if __name__ == "__main__":
    main()
