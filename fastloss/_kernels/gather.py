"""The kernel of the negative log-likelihood: one entry of each row."""

from fastloss._kernels import tiles
from fastloss._kernels._jit import subroutine
from fastloss._kernels._simd import load_one
from fastloss._kernels.driver import ANY_NUMBER, make_kernel
from fastloss._kernels.losses import begin_targets, deliver


@subroutine
def _nll_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
    """Loss = -w[t] * x[t] for each row that is not ignored."""
    like = out[0]
    stride = tiles.class_stride(geometry, tiles.INPUT)
    offsets, targets, loss = scratch.places[0], scratch.places[2], scratch.narrow[1]
    start, n = tiles.tile_bounds(geometry, tile)
    begin_targets(ledger, x, y, geometry, start, n, scratch)
    if geometry[tiles.IS_WEIGHTED]:
        for i in range(n):
            loss[i] = (
                -weight[targets[i]] * load_one(x, offsets[i] + targets[i] * stride, like) if targets[i] >= 0 else 0.0
            )
    else:
        for i in range(n):
            loss[i] = -load_one(x, offsets[i] + max(targets[i], 0) * stride, like) if targets[i] >= 0 else 0.0
    deliver(ledger, y, weight, out, geometry, start, n, scratch.places[1], targets, loss)


nll = make_kernel("nll", _nll_tile, light=ANY_NUMBER)
