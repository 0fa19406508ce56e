"""The kernel of the negative log-likelihood: one entry of each row."""

from fastloss._kernels import tiles
from fastloss._kernels._jit import subroutine
from fastloss._kernels._simd import load_one, prefetch_l2
from fastloss._kernels.driver import ANY_NUMBER, make_kernel
from fastloss._kernels.losses import begin_targets, deliver

# How many rows ahead of the loads their entries are asked for. The loads alone wait for memory: 400,000 x 100 takes
# twice as long without, and 1.1 times with 256.
AHEAD_ENTRIES = 128


@subroutine
def _nll_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
    """Loss = -w[t] * x[t] for each row that is not ignored."""
    like = out[0]
    stride = tiles.class_stride(geometry, tiles.INPUT)
    offsets, targets, loss = scratch.places[0], scratch.places[2], scratch.narrow[1]
    start, n = tiles.tile_bounds(geometry, tile)
    begin_targets(ledger, x, y, geometry, start, n, scratch)
    for first in range(-AHEAD_ENTRIES, n, AHEAD_ENTRIES):
        for i in range(first + AHEAD_ENTRIES, min(first + 2 * AHEAD_ENTRIES, n)):
            prefetch_l2(x, offsets[i] + max(targets[i], 0) * stride, 0)
        for i in range(max(first, 0), min(first + AHEAD_ENTRIES, n)):
            loss[i] = -load_one(x, offsets[i] + max(targets[i], 0) * stride, like) if targets[i] >= 0 else 0.0
    if geometry[tiles.IS_WEIGHTED]:
        for i in range(n):
            if targets[i] >= 0:
                loss[i] *= weight[targets[i]]
    deliver(ledger, y, weight, out, geometry, start, n, scratch.places[1], targets, loss)


nll = make_kernel("nll", _nll_tile, light=ANY_NUMBER)
