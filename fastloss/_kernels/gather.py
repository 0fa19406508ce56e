"""The kernel of the negative log-likelihood: one entry of each row."""

import numpy as np
from numba import prange

from fastloss._kernels import tiles
from fastloss._kernels._jit import Kernel, allocating, subroutine
from fastloss._kernels._simd import load_one, next_task
from fastloss._kernels.losses import collect, deliver
from fastloss._kernels.sums import STATE_SIZE


@allocating
def _work(counter, totals, counts, x, target, weight, out, geometry, options):
    like = weight[0]
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    width = geometry[tiles.TILE_ROWS] + tiles.PADDING
    offsets = np.empty(width, np.int64)
    targets = np.empty(width, np.int64)
    near = np.empty(width, np.int32)
    loss = tiles.aligned(width, weight)
    while True:
        tile = next_task(counter)
        if tile >= geometry[tiles.N_TILES]:
            break
        start, n = tiles.tile_bounds(geometry, tile)
        tiles.row_offsets(geometry, tiles.TARGET, start, n, offsets)
        tiles.read_targets(target, offsets, n, n_classes, options, targets, near, counts)
        tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
        for i in range(n):
            if targets[i] >= 0:
                loss[i] = -weight[targets[i]] * load_one(x, offsets[i] + targets[i] * stride, like)
            else:
                loss[i] = 0.0
        deliver(totals, out, geometry, start, n, offsets, targets, loss, weight, options)


def _nll(n_workers, totals, x, target, weight, out, geometry, options):
    """Loss = -w[t] * x[t] for each row that is not ignored."""
    counter = np.zeros(1, np.int64)
    states = np.zeros((n_workers, 2, STATE_SIZE), np.int64)
    counts = np.zeros((n_workers, 8), np.int64)
    for worker in prange(n_workers):
        _work(counter, states[worker], counts[worker], x, target, weight, out, geometry, options)
    return collect(totals, states, counts)


nll = Kernel("nll", _nll)
