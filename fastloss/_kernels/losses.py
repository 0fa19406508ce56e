"""The kernels of cross-entropy and log-sum-exp, as tile functions of :mod:`fastloss._kernels.driver`.

Each exists twice, over the tile functions of :mod:`rows` (contiguous class axis) and of :mod:`planes` (any other, and
few classes); the two give the same bits.
"""

import numpy as np

from fastloss._kernels import planes, rows, tiles
from fastloss._kernels._jit import inline, subroutine
from fastloss._kernels._simd import (
    any_lane,
    first_lane,
    fma,
    integer_like,
    lanes,
    load,
    load_integers,
    load_one,
    lowest_bit,
    mask_bits,
    scalar,
    splat,
    store,
    tree_sum,
    where,
)
from fastloss._kernels._vecmath import LOG1P_LIMIT, log1p
from fastloss._kernels.driver import (
    ANY_NUMBER,
    BAD,
    CORRECT,
    GUESS,
    KEPT,
    SECOND_GUESS,
    SECOND_SUM,
    Split,
    make_kernel,
    piece_bounds,
)
from fastloss._kernels.sums import add_block


@subroutine
def log1p_all(values, n):
    """log1p of ``values[:n]`` in place, a vector at a time."""
    like = values[0]
    for i in range(0, n, lanes(like)):
        store(values, i, log1p(load(values, i, like)))


@subroutine
def weigh(weight, geometry, n, targets, loss):
    """Multiply the losses of a tile by the weights of their targets, if there are any."""
    if geometry[tiles.IS_WEIGHTED]:
        for i in range(n):
            if targets[i] >= 0:
                loss[i] *= weight[targets[i]]


@subroutine
def deliver(ledger, weight, out, geometry, start, n, offsets, targets, loss, is_added):
    """Write the losses of a tile, or add them (unless ``is_added``), and the weights of its ``targets``, if there are
    any, to the ledger.
    """
    if geometry[tiles.WANTS_ROWS]:
        tiles.put_rows(out, geometry, tiles.OUT, start, n, offsets, loss)
    if geometry[tiles.WANTS_SUM] and not is_added:
        ledger[GUESS] = add_block(ledger[:SECOND_SUM], loss, n, ledger[GUESS])
        if geometry[tiles.IS_WEIGHTED]:
            for i in range(n):
                loss[i] = weight[targets[i]] if targets[i] >= 0 else 0.0
            ledger[SECOND_GUESS] = add_block(ledger[SECOND_SUM:KEPT], loss, n, ledger[SECOND_GUESS])


@subroutine
def begin_targets(ledger, x, y, geometry, start, n, scratch):
    """Read the targets of a tile, count them, and find its rows' offsets."""
    places = scratch.places
    kept, bad = tiles.read_targets(y, geometry, start, n, places[1], places[2], scratch.near)
    ledger[KEPT] += kept
    ledger[BAD] += bad
    tiles.row_offsets(geometry, tiles.INPUT, start, n, places[0])


# How far a loss must be from -log(1/2) or -log(1/C) to tell whether the prediction is right: far beyond its error.
SLACK = 1e-3

# Vectors of a row, or classes of a vector of rows, that are compared with the targets' logits before larger ones end
# the search.
VECTORS = 8


@inline
def _first_bits(count, n_lanes):
    """Bits of the first ``count`` lanes."""
    return (np.int64(1) << min(max(count, 0), n_lanes)) - 1


@inline
def _is_predicted(x, offset, stride, n_classes, target, own):
    """Whether a row's target is the class of the largest logit: of equal ones the first, and the first NaN if there is
    one, as ``numpy.argmax`` has it. ``own`` is the target's logit.
    """
    if own != own:
        for c in range(target):
            v = load_one(x, offset + c * stride, own)
            if v != v:
                return False
        return True
    owns, n_lanes = splat(own), lanes(own)
    c, wrong = np.int64(0), np.int64(0)
    if stride == 1:
        while c < n_classes and offset + c + n_lanes <= len(x):
            v = load(x, offset + c, own)
            fits = mask_bits(v < owns) | (mask_bits(v == owns) & ~_first_bits(target - c, n_lanes))
            wrong |= _first_bits(n_classes - c, n_lanes) & ~fits
            c += n_lanes
            if c % (VECTORS * n_lanes) == 0 and wrong:
                return False
    while c < n_classes:
        v = load_one(x, offset + c * stride, own)
        if not (v < own or (v == own and c >= target)):
            return False
        c += 1
    return wrong == 0


@inline
def _are_predicted(x, offset, stride, n_classes, target, owns, fits):
    """:func:`_is_predicted` of the rows of a vector that lie side by side and that ``fits`` holds; ``owns`` are the
    targets' logits. (Not of those for which that is NaN.)
    """
    own = first_lane(owns)
    for low in range(0, n_classes, VECTORS):
        if not any_lane(fits):
            break
        for c in range(low, min(low + VECTORS, n_classes)):
            v = load(x, offset + c * stride, own)
            fits = fits & ((v < owns) | ((v == owns) & (target <= splat(integer_like(c, own)))))
    return fits


@subroutine
def count_correct(x, geometry, offsets, n, targets, near, own, loss):
    """How many targets of a tile are their rows' predictions, see :func:`_is_predicted`.

    ``loss``, if it is an array, holds -log p of each target, which tells most rows: the largest probability is that of
    a target with p > 1/2, and not that of one with p < 1/C. The others are looked through, while the tile is in the
    cache, up to a larger class. ``own`` is scratch for the targets' logits.
    """
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    like, integer = own[0], integer_like(0, own[0])
    n_lanes, zero, one = lanes(like), splat(scalar(0.0, like)), splat(scalar(1.0, like))
    right = splat(scalar(np.log(2.0) - SLACK, like))
    wrong = splat(scalar(np.log(np.float64(n_classes)) + SLACK, like))
    behind_last_class = max((n_classes - 1) * stride, 0) + n_lanes
    for i in range(n):
        own[i] = load_one(x, offsets[i] + max(targets[i], 0) * stride, like)
    found, n_found = zero, np.int64(0)
    for first in range(0, n, n_lanes):
        last, offset = min(first + n_lanes, n) - 1, offsets[first]
        target, owns = load(near, first, integer), load(own, first, like)
        unsure = target >= splat(integer)
        if loss is not None and n_classes > n_lanes:
            value = load(loss, first, like)
            is_right = unsure & (value < right)
            found = found + where(is_right, one, zero)
            unsure = unsure & (is_right ^ (zero == zero)) & ((value > wrong) ^ (zero == zero))
        if stride != 1 and offsets[last] - offset == last - first and offset + behind_last_class <= len(x):
            fits = _are_predicted(x, offset, stride, n_classes, target, owns, unsure)
            found = found + where(fits, one, zero)
            unsure = unsure & (owns != owns)
        bits = mask_bits(unsure)
        while bits:
            i = first + lowest_bit(bits)
            n_found += _is_predicted(x, offsets[i], stride, n_classes, targets[i], own[i])
            bits &= bits - 1
    return n_found + np.int64(tree_sum(found))


# Small losses to which most may come from classes more than FAR below the target: from so much on, to so much for each
# class. The rounding of a float32 difference beyond 32 changes its exponential by up to 1.9e-6, in all classes alike
# where they are equal.
SMALL_LOSS = 0.99e-12
FAR = 32.0
SMALL_TERM = 2.0 * np.exp(-FAR)


@subroutine
def _sum_again(x, geometry, offsets, begin, end, targets, shifts, loss, scratch):
    """The losses of some rows of a tile; those that could not be summed relative to the target, or whose differences
    were rounded too much, relative to the maximum.
    """
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    like = shifts[0]
    low, high = scalar(SMALL_LOSS, like), scalar(SMALL_TERM * n_classes, like)
    for i in range(begin, end):
        fits = loss[i] < LOG1P_LIMIT and np.isfinite(shifts[i]) and not low <= loss[i] < high
        if targets[i] >= 0 and not fits:
            stages = (scratch.stage, scratch.stage)
            largest, rest = rows.max_shift_row(x, offsets[i], stride, n_classes, like, stages)
            log_rest = first_lane(log1p(splat(scalar(rest, like))))
            loss[i] = log_rest + (largest - shifts[i]) if np.isfinite(largest) else np.nan
        else:
            loss[i] = first_lane(log1p(splat(loss[i]))) if targets[i] >= 0 else 0.0


@subroutine
def _finish_targets(x, geometry, offsets, n, targets, near, shifts, loss, scratch):
    """The losses of a tile, without weights, from the sums of its rows, ``loss``.

    Computes, with s the sum of exp(x[c] - x[t]) over c != t, the loss log1p(s).

    Method: shifting by the target keeps the digits of a small loss and needs no pass for the maximum. Where s is too
    large (the target lies some 88 below the maximum) or x[t] is no number, the row is summed again, shifted by the
    maximum; so it is where s is made of many terms that are all small, for the rounding of x[c] - x[t] to be counted.
    """
    like = loss[0]
    n_lanes, integer = lanes(like), integer_like(0, like)
    zero, limit, nothing = splat(scalar(0.0, like)), splat(scalar(LOG1P_LIMIT, like)), splat(integer)
    low, high = splat(scalar(SMALL_LOSS, like)), splat(scalar(SMALL_TERM * geometry[tiles.N_CLASSES], like))
    for i in range(0, n, n_lanes):
        rest, kept = load(loss, i, like), load(near, i, integer) >= nothing
        # 0 * x[t] is NaN where x[t] is no number.
        fits = (fma(load(shifts, i, like), zero, rest) < limit) & ((rest < low) | (rest >= high))
        store(loss, i, where(kept, log1p(rest), zero))
        if any_lane(kept & (fits ^ (zero == zero))):
            store(loss, i, rest)
            _sum_again(x, geometry, offsets, i, min(i + n_lanes, n), targets, shifts, loss, scratch)


def _cross_entropy(tile_sums):
    """Cross-entropy with index targets."""

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
        offsets, targets = scratch.places[0], scratch.places[2]
        shifts, loss = scratch.narrow[0], scratch.narrow[1]
        start, n = tiles.tile_bounds(geometry, tile)
        begin_targets(ledger, x, y, geometry, start, n, scratch)
        tile_sums(x, geometry, start, offsets, n, targets, shifts, loss, scratch, None, offsets, 0)
        _finish_targets(x, geometry, offsets, n, targets, scratch.near, shifts, loss, scratch)
        if geometry[tiles.WANTS_CORRECT]:
            ledger[CORRECT] += count_correct(x, geometry, offsets, n, targets, scratch.near, shifts, loss)
        weigh(weight, geometry, n, targets, loss)
        deliver(ledger, weight, out, geometry, start, n, scratch.places[1], targets, loss, False)

    return do_tile


@subroutine
def _special_loss(x, y, geometry, offset, y_offset, weight, keep, spread, largest, log_rest):
    """Sum mass * -log_softmax(x) of a row term by term, where it is not finite: the inf or NaN that its terms make.

    The mass is weight * (y * keep + spread), or without ``y`` the weight.
    """
    if not np.isfinite(largest):
        return np.nan
    stride, y_stride = tiles.class_stride(geometry, tiles.INPUT), tiles.class_stride(geometry, tiles.TARGET)
    total = 0.0
    for c in range(geometry[tiles.N_CLASSES]):
        logit = load_one(x, offset + c * stride, largest)
        mass = np.float64(weight[c])
        if y is not None:
            mass *= np.float64(load_one(y, y_offset + c * y_stride, largest)) * keep + spread
        total += mass * (np.float64(log_rest) + np.float64(largest - logit))
    return total


@inline
def _join_terms(log_rest, moment, mass, result, n):
    """Write log_rest * mass + moment of each row; the lanes in which it is not finite for some row."""
    zero = splat(0.0)
    odd = zero != zero
    for i in range(0, n, lanes(0.0)):
        value = load(log_rest, i, 0.0) * load(mass, i, 0.0) + load(moment, i, 0.0)
        odd = odd | (value - value != zero)
        store(result, i, value)
    return odd


def _smoothed_cross_entropy(tile_sums):
    """Cross-entropy with index targets and label smoothing.

    Computes keep * w[t] * (M - x[t] + L) + spread * (L * sum(w) + sum(w[c] * (M - x[c]))), with M the maximum, L log1p
    of the other terms' sum, keep = 1 - eps and spread = eps / C.

    Method: relative to the maximum, because there every term is positive: with most of the weight on a likely class,
    the terms relative to the target would cancel.
    """

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
        like = out[0]
        stride = tiles.class_stride(geometry, tiles.INPUT)
        offsets, targets = scratch.places[0], scratch.places[2]
        largest, loss, at_target = scratch.narrow[0], scratch.narrow[1], scratch.narrow[2]
        rest, moment, mass, own_weight = scratch.wide[4], scratch.wide[5], scratch.wide[6], scratch.wide[7]
        start, n = tiles.tile_bounds(geometry, tile)
        begin_targets(ledger, x, y, geometry, start, n, scratch)
        tile_sums(
            x, geometry, start, offsets, n, None, offsets, weight, like, like, False,
            largest, rest, scratch.wide[9], moment, mass, scratch,
        )  # fmt: skip
        for i in range(n):
            loss[i] = rest[i]
        log1p_all(loss, n)
        odd = _join_terms(loss, moment, mass, moment, n)
        if any_lane(odd):
            for i in range(n):
                if targets[i] >= 0 and not np.isfinite(moment[i]):
                    moment[i] = _special_loss(x, None, geometry, offsets[i], 0, weight, 1.0, 0.0, largest[i], loss[i])
        for i in range(n):
            at = max(targets[i], 0)
            at_target[i] = largest[i] - load_one(x, offsets[i] + at * stride, like)
            own_weight[i] = weight[at]
        for i in range(0, n, lanes(0.0)):
            plain = load(own_weight, i, 0.0) * (load(at_target, i, 0.0) + load(loss, i, 0.0))
            value = splat(keep) * plain + splat(spread) * load(moment, i, 0.0)
            has_target = load_integers(targets, 8 * i, np.int64(0)) >= splat(np.int64(0))
            store(loss, i, where(has_target, value, splat(0.0)))
        if geometry[tiles.WANTS_CORRECT]:
            ledger[CORRECT] += count_correct(x, geometry, offsets, n, targets, scratch.near, largest, None)
        deliver(ledger, weight, out, geometry, start, n, scratch.places[1], targets, loss, False)

    return do_tile


def _probabilities(tile_sums):
    """Cross-entropy with class probabilities: -sum(w * y * log_softmax(x)), y smoothed to y * keep + spread.

    Method: with M the maximum and L = log1p of the other terms' sum, the loss is L * sum(w y) + sum(w y (M - x)):
    nothing cancels where weights and probabilities are not negative, so a small loss keeps its digits.
    """

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
        like = out[0]
        offsets, y_offsets = scratch.places[0], scratch.places[1]
        largest, loss = scratch.narrow[0], scratch.narrow[1]
        rest, moment, mass = scratch.wide[4], scratch.wide[5], scratch.wide[6]
        start, n = tiles.tile_bounds(geometry, tile)
        tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
        tiles.row_offsets(geometry, tiles.TARGET, start, n, y_offsets)
        tile_sums(
            x, geometry, start, offsets, n, y, y_offsets, weight, scalar(keep, like), scalar(spread, like), False,
            largest, rest, scratch.wide[9], moment, mass, scratch,
        )  # fmt: skip
        for i in range(n):
            loss[i] = rest[i]
        log1p_all(loss, n)
        odd = _join_terms(loss, moment, mass, moment, n)
        if any_lane(odd):
            for i in range(n):
                if not np.isfinite(moment[i]):
                    moment[i] = _special_loss(
                        x, y, geometry, offsets[i], y_offsets[i], weight, keep, spread, largest[i], loss[i]
                    )
        for i in range(n):
            loss[i] = moment[i]
        deliver(ledger, weight, out, geometry, start, n, offsets, offsets, loss, False)

    return do_tile


def _logsumexp(tile_sums):
    """Log-sum-exp: the maximum plus log1p of the other terms' sum."""

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
        like = out[0]
        offsets = scratch.places[0]
        largest, result = scratch.narrow[0], scratch.narrow[1]
        rest, unused = scratch.wide[4], scratch.wide[5]
        start, n = tiles.tile_bounds(geometry, tile)
        tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
        tile_sums(
            x, geometry, start, offsets, n, None, offsets, None, like, like, False,
            largest, rest, scratch.wide[9], unused, unused, scratch,
        )  # fmt: skip
        for i in range(n):
            result[i] = rest[i]
        log1p_all(result, n)
        for i in range(n):
            result[i] += largest[i]
        tiles.put_rows(out, geometry, tiles.SECOND, start, n, offsets, result)

    return do_tile


# -------------------------------------------------------------------------------------------- pieces of a long row


def _target_pieces(piece_sums, size):
    """The part of :func:`_cross_entropy` that reads the rows, piece by piece."""

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
        start, n, begin, end = piece_bounds(geometry, tile, size)
        begin_targets(ledger, x, y, geometry, start, n, scratch)
        piece_sums(x, geometry, start, scratch.places[0], n, begin, end, scratch.places[2], scratch.narrow[0], scratch)

    return do_tile


@inline
def logits_alone(y, weight):
    return None, None


@inline
def _weight_alone(y, weight):
    return None, weight


@inline
def _both(y, weight):
    return y, weight


def max_shift_pieces(piece_sums, size, chosen, is_exact=False):
    """The part of the other kernels that reads the rows, piece by piece; ``chosen(y, weight)`` is what it needs."""

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
        like = out[0]
        offsets, y_offsets = scratch.places[0], scratch.places[1]
        start, n, begin, end = piece_bounds(geometry, tile, size)
        tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
        tiles.row_offsets(geometry, tiles.TARGET, start, n, y_offsets)
        y, weight = chosen(y, weight)
        piece_sums(
            x, geometry, start, offsets, n, begin, end, y, y_offsets, weight, scalar(keep, like), scalar(spread, like),
            is_exact, like, scratch,
        )  # fmt: skip

    return do_tile


def _make_cross_entropy():
    """The kernels for contiguous and for strided classes."""
    kernels = []
    join = make_kernel("cross_entropy_join", _cross_entropy(rows.joined_targets), ANY_NUMBER, has_records=True)
    for module, kind, light in ((rows, "rows", ANY_NUMBER), (planes, "planes", 2)):
        do_piece = _target_pieces(module.target_pieces, module.PIECE)
        pieces = make_kernel(f"cross_entropy_{kind}_pieces", do_piece, light, has_records=True)
        split = Split(pieces, module.PIECE, 1, join)
        kernels.append(make_kernel(f"cross_entropy_{kind}", _cross_entropy(module.target_tile), light, split=split))
    return kernels


def _make_shifted_by_maximum(name, make_tile, chosen):
    """The kernels for contiguous and for strided classes."""
    kernels = []
    join = make_kernel(f"{name}_join", make_tile(rows.joined_max_shifts), has_records=True)
    for module, kind in ((rows, "rows"), (planes, "planes")):
        do_piece = max_shift_pieces(module.max_shift_pieces, module.PIECE, chosen)
        pieces = make_kernel(f"{name}_{kind}_pieces", do_piece, has_records=True)
        split = Split(pieces, module.PIECE, rows.FOUND, join)
        kernels.append(make_kernel(f"{name}_{kind}", make_tile(module.max_shift_tile), split=split))
    return kernels


cross_entropy_rows, cross_entropy_planes = _make_cross_entropy()
smoothed_rows, smoothed_planes = _make_shifted_by_maximum("smoothed", _smoothed_cross_entropy, _weight_alone)
probabilities_rows, probabilities_planes = _make_shifted_by_maximum("probabilities", _probabilities, _both)
logsumexp_rows, logsumexp_planes = _make_shifted_by_maximum("logsumexp", _logsumexp, logits_alone)
