"""Arrays as flat memory, and shapes as the tables of integers that the kernels walk along: no copies.

A kernel gets every array as a one-dimensional view of all the memory between its first and its last element, and a
*geometry* (see :mod:`fastloss._kernels.tiles`) that says where the rows lie in it. So there is one compiled kernel for
every shape and every layout: C or Fortran order, transposed, sliced, negative and zero strides, read-only.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fastloss._validation import Array, is_bfloat16, is_floating

# Tiles of the kernels in rows, see tile_rows().
TILE = 256
TILE_OF_FEW = 1024  # few classes: what is done once per tile shows (1,000,000 x 10 takes 1.2 times as long with 256)
# Where many strided classes are read as they lie, in runs of up to 4 KiB of memory (log-sum-exp of 65,536 x 1000 along
# axis 0 takes 1.4 times as long with 256, 1.2 times with 512).
_WIDE_TILE = 1024
# Where one entry of each row is read: every tile begins with waiting for its first ones (nll_loss of 400,000 x 100
# takes 1.1 times as long with 1024). Of fewer rows so large tiles would be too few for many threads.
_TILE_OF_ENTRIES = 2048
_MANY_ENTRIES = 64 * _TILE_OF_ENTRIES
_MANY_ROWS = 8192  # for fewer rows, the scratch of so large a tile may be larger than the input
_TILE_BYTES = 1 << 17
# Up to so many bytes of classes in the compute dtype (36 float32, 18 float64), a contiguous class axis goes through the
# kernel for strided ones, a vector of rows at a time. (Of 33 float32 classes log-sum-exp takes 1.4 times as long row by
# row, cross-entropy 1.1 times; of 48 float32 or 24 float64 classes, cross-entropy and softmax take 0.8 times as long.)
_FEW_BYTES = 144
# With fewer rows than this, a vector of rows would be mostly empty.
_FEW_ROWS = 8
# Elements per tile of the pointwise kernel: what is done once per tile shows (65,536 x 500 takes 1.1 times as long with
# 1024), and two streams of a tile fit into the first-level cache (1.03 times as long with 4096).
ELEMENT_TILE = 2048
# Runs of rows shorter than this are tiled together.
_SHORT_RUN = 64
# What odd data (byte-swapped, unaligned, integers) is copied in pieces of, in elements.
PIECE = 1 << 17

Strides = tuple[int, ...]

_BYTES = np.dtype(np.uint8)


class _Memory:
    """Hands an address to NumPy, and keeps its owner alive."""

    def __init__(self, owner: Array, address: int, count: int, typestr: str) -> None:
        self.owner = owner
        self.__array_interface__ = {"data": (address, False), "shape": (count,), "typestr": typestr, "version": 3}


@functools.lru_cache(maxsize=64)
def storage_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype under which the kernels see data: uint16 for float16, int16 for bfloat16 (Numba has neither)."""
    if dtype.char == "e":
        return np.dtype(np.uint16)
    if is_bfloat16(dtype):
        return np.dtype(np.int16)
    return dtype


@functools.lru_cache(maxsize=64)
def compute_dtype(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the result: halves count as float32, integers and bool as float64."""
    if all(d.char == "f" or d.itemsize == 2 for d in dtypes if is_floating(d)) and all(is_floating(d) for d in dtypes):
        return np.dtype(np.float32)
    return np.dtype(np.float64)


# How an array lies in its memory: its dtype, shape, strides in bytes, and at which byte its first element is.
Layout = tuple[np.dtype[Any], tuple[int, ...], Strides, int]


def lies_well(array: Array) -> bool:
    """Whether the kernels can read the array where it lies: floating, in native byte order, aligned, whole strides."""
    if not (is_floating(array.dtype) and array.dtype.isnative):
        return False
    flags = array.flags
    itemsize = array.itemsize
    return flags.aligned and (flags.c_contiguous or all(s % itemsize == 0 for s in array.strides))


def layout(array: Array) -> Layout:
    """How a C-contiguous array lies in its memory."""
    return array.dtype, array.shape, array.strides, 0


def flatten(array: Array, is_index: bool = False) -> tuple[Array, Layout]:
    """All the memory that a non-empty array spans (of class indices, the bytes), and how the array lies in it.

    The view is writeable in name, so that Numba compiles nothing twice; the kernels write to their results alone.
    """
    dtype = _BYTES if is_index else storage_dtype(array.dtype)
    flags = array.flags
    if flags.c_contiguous and flags.writeable:
        flat = array.reshape(-1)
        if flat.dtype is not dtype:
            flat = flat.view(dtype)
        return flat, layout(array)
    low = high = 0
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            low += (length - 1) * stride
        else:
            high += (length - 1) * stride
    address: int = array.__array_interface__["data"][0]
    count = (high - low + array.itemsize) // dtype.itemsize
    memory = _Memory(array, address + low, count, dtype.str)
    return np.asarray(memory), (array.dtype, array.shape, array.strides, -low)


def is_in_rows(n_rows: int, n_classes: int, dtype: np.dtype[Any], is_contiguous: bool) -> bool:
    """Whether a kernel that computes in a dtype takes classes of one row to a vector (else one of several rows)."""
    return n_rows < _FEW_ROWS or (is_contiguous and n_classes * dtype.itemsize > _FEW_BYTES)


def tile_rows(n_rows: int, n_classes: int, in_rows: bool) -> int:
    """Rows per tile: no more than there are, and few enough for contiguous rows to stay in the second-level cache."""
    most = min(TILE, -(-n_rows // 16) * 16)
    if in_rows:
        return max(1, min(most, _TILE_BYTES // (4 * n_classes)))
    if n_classes <= _FEW_BYTES // 4:
        return TILE_OF_FEW if n_rows >= _MANY_ROWS else most
    return most


def entry_tile_rows(n_rows: int) -> int:
    """Rows per tile of the kernel that reads one entry of each."""
    return _TILE_OF_ENTRIES if n_rows >= _MANY_ENTRIES else tile_rows(n_rows, 1, False)


def wide_tile_rows(n_rows: int, n_pieces: int, n_threads: int) -> int:
    """Rows per tile where many classes are read as they lie in memory, ``n_pieces`` of them if the rows are split: wide
    ones that leave even shares of work for all threads.
    """
    n_tiles = -(-n_rows // _WIDE_TILE)
    if n_tiles > n_threads or n_tiles * n_pieces < 4 * n_threads:
        n_tiles = -(-n_tiles // n_threads) * n_threads
    return max(TILE, -(-n_rows // (16 * n_tiles)) * 16)


@functools.lru_cache(maxsize=512)
def merge_axes(shape: tuple[int, ...], strides: tuple[Strides, ...]) -> tuple[tuple[int, ...], tuple[Strides, ...]]:
    """Sort the axes of several arrays of one shape by the first array's memory order, and join those that follow on."""
    axes = [a for a in range(len(shape)) if shape[a] != 1]
    axes.sort(key=lambda a: [-abs(s[a]) for s in strides])
    merged: list[tuple[int, list[int]]] = []
    for a in axes:
        steps = [s[a] for s in strides]
        if merged and all(outer == step * shape[a] for outer, step in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * shape[a], steps)
        else:
            merged.append((shape[a], steps))
    if not merged:
        merged.append((1, [0] * len(strides)))
    return tuple(n for n, _ in merged), tuple(tuple(steps[i] for _, steps in merged) for i in range(len(strides)))


@functools.lru_cache(maxsize=512)
def geometry(
    shape: tuple[int, ...],
    n_classes: int,
    tile: int,
    arrays: tuple[tuple[Layout | None, int | None], ...],
    options: "Options",
) -> Array:
    """The table of :mod:`fastloss._kernels.tiles` for rows of this shape and arrays with these class axes.

    Class indices are counted in bytes, and a result that is not wanted is None.
    """
    places = []
    for layout, class_axis in arrays:
        if layout is None:
            places.append((0, 0, (0,) * len(shape)))
        else:
            dtype, _, byte_strides, origin = layout
            unit = dtype.itemsize if is_floating(dtype) else 1
            steps = tuple(s // unit for s in byte_strides)
            class_stride = 0 if class_axis is None else steps[class_axis]
            places.append((origin // unit, class_stride, without(steps, class_axis)))
    shape, strides = merge_axes(shape, tuple(steps for _, _, steps in places))
    n_rows = math.prod(shape)
    tile = min(tile, -(-n_rows // 16) * 16)
    run = shape[-1] if shape[-1] >= _SHORT_RUN else n_rows
    n_tiles = n_rows // run * -(-run // tile)
    table: list[int] = [n_rows, n_classes, tile, 0, n_tiles, run, len(shape), *options, *shape]
    for (origin, class_stride, _), steps in zip(places, strides, strict=True):
        table += [origin, class_stride, *steps]
    return np.array(table, np.int64)


def follows_on(array: Array, axes: tuple[int, ...]) -> bool:
    """Whether some axes, taken together in their order, have one stride."""
    lengths = [(array.shape[a], array.strides[a]) for a in axes if array.shape[a] != 1]
    return all(outer == inner * length for (_, outer), (length, inner) in itertools.pairwise(lengths))


def without(values: tuple[Any, ...], axis: int | None) -> tuple[Any, ...]:
    return values if axis is None else values[:axis] + values[axis + 1 :]


class Options(NamedTuple):
    """What a kernel is asked for besides its arrays, in the order of :mod:`fastloss._kernels.tiles`."""

    target_kind: int = 0
    has_ignore: bool = False
    ignore_index: int = 0
    is_weighted: bool = False
    wants_rows: bool = False
    wants_sum: bool = False
    is_log: bool = False
    wants_correct: bool = False


@functools.cache
def one(dtype: np.dtype[Any]) -> Array:
    """One element, for the kernels to see the dtype of a result that is not wanted."""
    return np.zeros(1, dtype)


def lay_out(
    shape: tuple[int, ...],
    n_classes: int,
    tile: int,
    arrays: Iterable[tuple[Array | None, int | None]],
    dtype: np.dtype[Any],
    options: Options,
) -> tuple[list[Array], Array]:
    """Arrays with their class axes as flat memory (a result that is not wanted as one element of ``dtype``), and the
    geometry of their rows, which have the given shape.
    """
    flats, layouts = [], []
    for array, class_axis in arrays:
        flat, layout = (one(dtype), None) if array is None else flatten(array)
        flats.append(flat)
        layouts.append((layout, class_axis))
    return flats, geometry(shape, n_classes, tile, tuple(layouts), options)


def readable_pieces(
    inputs: tuple[tuple[Array, int | None, bool], ...],
    result: tuple[Array | None, int | None],
    dtype: np.dtype[Any],
    *others: tuple[Array | None, int | None],
) -> Iterable[tuple[Any, ...]]:
    """The inputs, and the results that go with them (or None), as the kernels can read them.

    An input is an array, its class axis (None for class indices and pointwise values) and whether it holds class
    indices; a result is an array and its class axis. Where all inputs lie well that is themselves, once. Else it is
    piece after piece of the rows, the inputs copied (integers that are no class indices as ``dtype``), the results as
    views.
    """
    for array, _, is_index in inputs:
        if not (array.dtype.isnative if is_index else lies_well(array)):
            return _copied_pieces(inputs, (result, *others), dtype)
    return ((*(array for array, _, _ in inputs), result[0], *(other[0] for other in others)),)


def _copied_pieces(
    inputs: tuple[tuple[Array, int | None, bool], ...],
    results: tuple[tuple[Array | None, int | None], ...],
    dtype: np.dtype[Any],
) -> Iterator[tuple[Any, ...]]:
    array, class_axis, _ = inputs[0]
    for cut in pieces(array.shape, () if class_axis is None else (class_axis,)):
        row_cut = without(cut, class_axis)
        copies = []
        for source, axis, is_index in inputs:
            native = source.dtype.newbyteorder("=") if is_index or is_floating(source.dtype) else dtype
            copies.append(np.array(source[row_cut if axis is None else cut], native, order="C"))
        # (With the ellipsis, an index of a 0-d array gives a view too.)
        views = (None if out is None else out[(*(row_cut if axis is None else cut), ...)] for out, axis in results)
        yield (*copies, *views)


def pieces(shape: tuple[int, ...], whole_axes: tuple[int, ...] = ()) -> Iterator[tuple[slice, ...]]:
    """Cut an array into pieces of about :data:`PIECE` elements, in C order, never along ``whole_axes``."""
    room = max(1, PIECE // max(1, math.prod(shape[a] for a in whole_axes)))
    steps = list(shape)
    for axis in reversed(range(len(shape))):
        if axis not in whole_axes:
            steps[axis] = max(1, min(shape[axis], room))
            room //= max(1, steps[axis])

    def cut(axis: int, before: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
        if axis == len(shape):
            yield before
            return
        step = max(1, steps[axis])
        for begin in range(0, shape[axis], step):
            yield from cut(axis + 1, (*before, slice(begin, min(begin + step, shape[axis]))))

    yield from cut(0, ())
