"""The kernel of the negative log-likelihood: one entry of each row."""

import numpy as np

from fastloss._kernels import tiles
from fastloss._kernels._jit import inline, subroutine
from fastloss._kernels._memory import IS_ZEN
from fastloss._kernels._simd import (
    integer_like,
    lanes,
    load,
    load_integers,
    load_one,
    prefetch,
    prefetch_l2,
    scalar,
    splat,
    store,
    where,
)
from fastloss._kernels.driver import ANY_NUMBER, CORRECT, GUESS, SECOND_SUM, make_kernel
from fastloss._kernels.losses import begin_targets, count_correct, deliver, weigh
from fastloss._kernels.sums import FIRST_GUESS, NARROW, NO_GUESS

# How many rows ahead of the loads their entries are asked for, and where. The first-level cache of AMD's Zen 4 waits
# for fewer lines at a time than the second: 400,000 x 100 takes 1.7 times as long if they are asked for in the first.
# On an Intel Xeon it takes 1.15 times as long if they are asked for in the second, or not at all.
AHEAD_ENTRIES = 128
ask_for_entry = prefetch_l2 if IS_ZEN else prefetch

_grids, _no_sums, _add_vector, _, _add_sums, _ = NARROW


@inline
def _find_entries(offsets, targets, n, stride):
    """Where the entries of some rows lie (the first of a row without a target), instead of where the rows do."""
    nothing, step = splat(np.int64(0)), splat(stride)
    for i in range(0, n, lanes(0.0)):
        target = load_integers(targets, 8 * i, np.int64(0))
        target = where(target > nothing, target, nothing)
        store(offsets, i, load_integers(offsets, 8 * i, np.int64(0)) + target * step)


@subroutine
def _nll_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
    """Loss = -w[t] * x[t] for each row that is not ignored.

    Without weights, a vector of losses is added to the exact sum while the next is gathered, on the grids guessed: the
    CPU has the arithmetic done by the way (in a pass of its own it takes 7 % of 400,000 x 100, so 3 %).
    """
    like = out[0]
    n_lanes, zero = lanes(like), splat(scalar(0.0, like))
    offsets, near, loss = scratch.places[0], scratch.near, scratch.narrow[1]
    targets, nothing = scratch.places[2], integer_like(0, like)
    start, n = tiles.tile_bounds(geometry, tile)
    begin_targets(ledger, x, y, geometry, start, n, scratch)
    _find_entries(offsets, targets, n, tiles.class_stride(geometry, tiles.INPUT))
    guess = ledger[GUESS]
    adds = geometry[tiles.WANTS_SUM] != 0 and geometry[tiles.IS_WEIGHTED] == 0 and guess != NO_GUESS
    constants, sums = _grids(zero, guess if adds else np.int64(FIRST_GUESS)), _no_sums(zero)
    for first in range(-AHEAD_ENTRIES, n + n_lanes, n_lanes):
        for i in range(first + AHEAD_ENTRIES, min(first + AHEAD_ENTRIES + n_lanes, n)):
            ask_for_entry(x, offsets[i], 0)
        for i in range(max(first, 0), min(first + n_lanes, n)):
            loss[i] = load_one(x, offsets[i], like)
        before = first - n_lanes
        if before >= 0:
            has_target = load(near, before, nothing) >= splat(nothing)
            value = where(has_target, -load(loss, before, like), zero)
            store(loss, before, value)
            if adds:
                sums = _add_vector(value, sums, constants)
    n_vectors = (n + n_lanes - 1) // n_lanes
    if adds and not _add_sums(zero, ledger[:SECOND_SUM], sums, guess, n_vectors, True):
        ledger[GUESS] = NO_GUESS
        adds = False
    weigh(weight, geometry, n, targets, loss)
    if geometry[tiles.WANTS_CORRECT]:
        tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
        ledger[CORRECT] += count_correct(x, geometry, offsets, n, targets, near, scratch.narrow[0], None)
    deliver(ledger, weight, out, geometry, start, n, scratch.places[1], targets, loss, adds)


nll = make_kernel("nll", _nll_tile, light=ANY_NUMBER)
