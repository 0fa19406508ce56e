"""The kernels of softmax and log_softmax: a tile's statistics, then its entries while they are in the cache."""

from fastloss._kernels import planes, rows, tiles
from fastloss._kernels._jit import inline, subroutine
from fastloss._kernels.driver import GROUP_OF_ROW, STAGED, Split, make_kernel, piece_bounds, record_at
from fastloss._kernels.losses import logits_alone, max_shift_pieces


@inline
def _find_scales(x, geometry, start, offsets, n, tile_sums, scratch):
    """What the entries of a tile's rows are made of, the maxima and the scales, in two parts, see :func:`_softmax`:
    three rows of ``narrow``.
    """
    largest, scales, lows = scratch.narrow[0], scratch.narrow[1], scratch.narrow[2]
    rest, lost, unused = scratch.wide[4], scratch.wide[9], scratch.wide[5]
    like = largest[0]
    tile_sums(
        x, geometry, start, offsets, n, None, offsets, None, like, like, True,
        largest, rest, lost, unused, unused, scratch,
    )  # fmt: skip
    rows.find_scales(largest, rest, lost, scales, lows, 0, n, geometry[tiles.IS_LOG] != 0)


def _softmax(tile_sums, write_tile, can_scale, scaled_tile):
    """Softmax exp(x - M) * (1 / S) or log_softmax (x - M) - log1p(S - 1), with M the maximum and S = sum(exp(x - M)).

    Accuracy: within 4 ulp of the exact value, mostly 2, softmax where it is a normal number (benchmarks/accuracy.py;
    the terms of log_softmax are both negative, so nothing cancels). Beyond the exponential's own error, S is summed in
    the compute type within a lane of a block, and the product of softmax rounds once; neither S nor 1 / S is rounded in
    between.

    Memory passes: the tile is read twice more from the cache and written once; where the module's ``scaled_tile``
    serves, what it keeps of a row is read instead.
    """

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
        offsets, out_offsets = scratch.places[0], scratch.places[1]
        start, n = tiles.tile_bounds(geometry, tile)
        n_classes, is_log = geometry[tiles.N_CLASSES], geometry[tiles.IS_LOG] != 0
        tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
        tiles.row_offsets(geometry, tiles.SECOND, start, n, out_offsets)
        if can_scale(geometry, out[0]):
            scaled_tile(x, geometry, start, offsets, n, out, out_offsets, scratch)
            return
        _find_scales(x, geometry, start, offsets, n, tile_sums, scratch)
        write_tile(
            x, geometry, start, offsets, n, 0, n_classes, out, out_offsets,
            scratch.narrow[0], scratch.narrow[1], scratch.narrow[2], is_log, scratch,
        )  # fmt: skip

    return do_tile


@subroutine
def _join(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
    """The maximum and the scale of each row, into the record of its first chunk."""
    largest, scales, lows = scratch.narrow[0], scratch.narrow[1], scratch.narrow[2]
    start, n = tiles.tile_bounds(geometry, tile)
    _find_scales(x, geometry, start, scratch.places[0], n, rows.joined_max_shifts, scratch)
    for i in range(n):
        at = record_at(geometry, start + i, 0, rows.FOUND)
        scratch.records[at] = largest[i]
        scratch.records[at + 1] = scales[i]
        scratch.records[at + 2] = lows[i]


def _write_pieces(write_tile, size):
    """The part of :func:`_softmax` that writes, piece by piece, given what :func:`_join` has found."""

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
        offsets, out_offsets = scratch.places[0], scratch.places[1]
        largest, scales, lows = scratch.narrow[0], scratch.narrow[1], scratch.narrow[2]
        start, n, begin, end = piece_bounds(geometry, tile, size)
        tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
        tiles.row_offsets(geometry, tiles.SECOND, start, n, out_offsets)
        for i in range(n):
            at = record_at(geometry, start + i, 0, rows.FOUND)
            largest[i] = scratch.records[at]
            scales[i] = scratch.records[at + 1]
            lows[i] = scratch.records[at + 2]
        is_log = geometry[tiles.IS_LOG] != 0
        write_tile(x, geometry, start, offsets, n, begin, end, out, out_offsets, largest, scales, lows, is_log, scratch)

    return do_tile


def _make_softmax():
    """The kernels for contiguous and for strided classes."""
    kernels = []
    join = make_kernel("softmax_join", _join, has_records=True)
    for module, kind, keeps in ((rows, "rows", GROUP_OF_ROW), (planes, "planes", STAGED)):
        do_piece = max_shift_pieces(module.max_shift_pieces, module.PIECE, logits_alone, is_exact=True)
        pieces = make_kernel(f"softmax_{kind}_pieces", do_piece, has_records=True)
        do_write = _write_pieces(module.write_tile, module.PIECE)
        write = make_kernel(f"softmax_{kind}_write", do_write, has_records=True)
        split = Split(pieces, module.PIECE, rows.FOUND, join, write)
        do_tile = _softmax(module.max_shift_tile, module.write_tile, module.can_scale, module.scaled_tile)
        kernels.append(make_kernel(f"softmax_{kind}", do_tile, keeps=keeps, split=split))
    return kernels


softmax_rows, softmax_planes = _make_softmax()
