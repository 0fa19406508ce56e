"""The kernels of softmax and log_softmax: a tile's statistics, then its entries while they are in the cache."""

import numpy as np
from numba import prange

from fastloss._kernels import planes, rows, tiles
from fastloss._kernels._jit import Kernel, allocating, subroutine
from fastloss._kernels._simd import next_task
from fastloss._kernels.losses import log1p_all


def _softmax(name, tile_sums, write_tile):
    """Softmax exp(x - M) * (1 / S) or log_softmax (x - M) - log1p(S - 1), with M the maximum and S = sum(exp(x - M)).

    Accuracy: softmax within 2 ulp where it is a normal number; log_softmax within 2 ulp (both of its terms are
    negative, so nothing cancels). Memory passes: the tile is read twice more from the cache and written once.
    """

    @allocating
    def work(counter, x, out, geometry, is_log):
        like = out[0]
        width = geometry[tiles.TILE_ROWS] + tiles.PADDING
        scratch = planes.make_scratch(width, out)
        stage = tiles.aligned(planes.BATCH * width, x)
        out_stage = tiles.aligned(planes.BATCH * width, out)
        offsets = np.empty(width, np.int64)
        out_offsets = np.empty(width, np.int64)
        largest = tiles.aligned(width, out)
        scales = tiles.aligned(width, out)
        rest = np.zeros(width, np.float64)
        unused = np.zeros(width, np.float64)
        while True:
            tile = next_task(counter)
            if tile >= geometry[tiles.N_TILES]:
                break
            start, n = tiles.tile_bounds(geometry, tile)
            tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
            tiles.row_offsets(geometry, tiles.SECOND, start, n, out_offsets)
            tile_sums(
                x, geometry, start, offsets, n, None, offsets, None, like, like, is_log,
                largest, rest, unused, unused, (stage, stage), scratch,
            )  # fmt: skip
            for i in range(n):
                scales[i] = rest[i] if is_log else 1.0 / (1.0 + rest[i])
            if is_log:
                log1p_all(scales, n)
            for i in range(n):
                if not np.isfinite(largest[i]):
                    scales[i] = np.nan
            write_tile(x, geometry, start, offsets, n, out, out_offsets, largest, scales, is_log, stage, out_stage)

    def kernel(n_workers, x, out, geometry, is_log):
        counter = np.zeros(1, np.int64)
        for _ in prange(n_workers):
            work(counter, x, out, geometry, is_log)

    return Kernel(name, kernel)


softmax_rows = _softmax("softmax_rows", rows.max_shift_tile, rows.write_tile)
softmax_planes = _softmax("softmax_planes", planes.max_shift_tile, planes.write_tile)
