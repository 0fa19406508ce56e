"""The kernels of softmax and log_softmax: a tile's statistics, then its entries while they are in the cache."""

import numpy as np

from fastloss._kernels import planes, rows, tiles
from fastloss._kernels._jit import subroutine
from fastloss._kernels.driver import make_kernel
from fastloss._kernels.losses import log1p_all


def _softmax(tile_sums, write_tile):
    """Softmax exp(x - M) * (1 / S) or log_softmax (x - M) - log1p(S - 1), with M the maximum and S = sum(exp(x - M)).

    Accuracy: softmax within 2 ulp where it is a normal number; log_softmax within 2 ulp (both of its terms are
    negative, so nothing cancels). Memory passes: the tile is read twice more from the cache and written once.
    """

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
        like = out[0]
        is_log = geometry[tiles.IS_LOG] != 0
        offsets, out_offsets = scratch.places[0], scratch.places[1]
        largest, scales = scratch.narrow[0], scratch.narrow[1]
        rest, unused = scratch.wide[4], scratch.wide[5]
        start, n = tiles.tile_bounds(geometry, tile)
        tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
        tiles.row_offsets(geometry, tiles.SECOND, start, n, out_offsets)
        tile_sums(
            x, geometry, start, offsets, n, None, offsets, None, like, like, True,
            largest, rest, unused, unused, scratch,
        )  # fmt: skip
        for i in range(n):
            scales[i] = rest[i] if is_log else 1.0 / (1.0 + rest[i])
        if is_log:
            log1p_all(scales, n)
        for i in range(n):
            if not np.isfinite(largest[i]):
                scales[i] = np.nan
        write_tile(x, geometry, start, offsets, n, out, out_offsets, largest, scales, is_log, scratch)

    return do_tile


softmax_rows = make_kernel("softmax_rows", _softmax(rows.max_shift_tile, rows.write_tile))
softmax_planes = make_kernel("softmax_planes", _softmax(planes.max_shift_tile, planes.write_tile))
