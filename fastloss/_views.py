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
_TILE_BYTES = 1 << 17
# Tiles that a thread takes at a time: what it asks for ahead of its loads is then mostly its own. No fewer than some
# tasks, for the threads to end together.
MAX_TASK = 16
MIN_TASKS = 64
# Up to this many classes, a contiguous class axis goes through the kernel for strided ones, 16 rows to a vector.
FEW_CLASSES = 24
# With fewer rows than this, a vector of rows would be mostly empty.
FEW_ROWS = 8
# Elements per tile of the pointwise kernel.
ELEMENT_TILE = 1024
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


def storage_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype under which the kernels see data: uint16 for float16, int16 for bfloat16 (Numba has neither)."""
    if dtype.char == "e":
        return np.dtype(np.uint16)
    if is_bfloat16(dtype):
        return np.dtype(np.int16)
    return dtype


def compute_dtype(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the result: halves count as float32, integers and bool as float64."""
    if all(d.char == "f" or d.itemsize == 2 for d in dtypes if is_floating(d)) and all(is_floating(d) for d in dtypes):
        return np.dtype(np.float32)
    return np.dtype(np.float64)


def lies_well(array: Array) -> bool:
    """Whether the kernels can read the array where it lies: floating, in native byte order, aligned, whole strides."""
    itemsize = array.itemsize
    return (
        is_floating(array.dtype)
        and array.dtype.isnative
        and array.flags.aligned
        and all(s % itemsize == 0 for s in array.strides)
    )


def flatten(array: Array, dtype: np.dtype[Any]) -> tuple[Array, int]:
    """All the memory that a non-empty array spans, as ``dtype``, and where in it the array's first element is.

    The view is writeable in name, so that Numba compiles nothing twice; the kernels write to their results alone.
    """
    flags = array.flags
    if flags.c_contiguous and flags.writeable:
        flat = array.reshape(-1)
        return flat if flat.dtype == dtype else flat.view(dtype), 0
    low = high = 0
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            low += (length - 1) * stride
        else:
            high += (length - 1) * stride
    address: int = array.__array_interface__["data"][0]
    count = (high - low + array.itemsize) // dtype.itemsize
    memory = _Memory(array, address + low, count, dtype.str)
    return np.asarray(memory), -low // dtype.itemsize


def tile_rows(n_rows: int, n_classes: int, in_rows: bool) -> int:
    """Rows per tile: no more than there are, and few enough for contiguous rows to stay in the second-level cache."""
    most = min(TILE, -(-n_rows // 16) * 16)
    if in_rows:
        return max(1, min(most, _TILE_BYTES // (4 * n_classes)))
    return min(TILE_OF_FEW, -(-n_rows // 16) * 16) if n_classes <= FEW_CLASSES else most


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
    origins: tuple[int, ...],
    class_strides: tuple[int, ...],
    strides: tuple[Strides, ...],
    options: "Options",
) -> Array:
    """The table of :mod:`fastloss._kernels.tiles` for rows of this shape."""
    shape, strides = merge_axes(shape, strides)
    n_rows = math.prod(shape)
    run = shape[-1] if shape[-1] >= _SHORT_RUN else n_rows
    n_tiles = n_rows // run * -(-run // tile)
    task = max(1, min(MAX_TASK, n_tiles // MIN_TASKS))
    table: list[int] = [n_rows, n_classes, tile, n_tiles, task, run, len(shape), *options, *shape]
    for origin, class_stride, steps in zip(origins, class_strides, strides, strict=True):
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


class Operand(NamedTuple):
    """An array that a kernel reads or writes, of the rows' shape and, unless ``class_axis`` is None, one axis more.

    ``is_index`` marks class indices, which are read as bytes so that one kernel takes every integer dtype. A result
    that is not wanted is empty.
    """

    array: Array
    class_axis: int | None = None
    is_index: bool = False


@functools.cache
def _one(dtype: np.dtype[Any]) -> Array:
    """One element, for the kernels to see the dtype of a result that is not wanted."""
    return np.zeros(1, dtype)


def lay_out(
    shape: tuple[int, ...], n_classes: int, tile: int, operands: Iterable[Operand], options: Options
) -> tuple[list[Array], Array]:
    """The operands as flat memory, and the geometry of their rows, which have the given shape."""
    flats, origins, class_strides, strides = [], [], [], []
    for array, class_axis, is_index in operands:
        if not array.size:
            flats.append(_one(array.dtype))
            origins.append(0)
            class_strides.append(0)
            strides.append((0,) * len(shape))
            continue
        unit = 1 if is_index else array.itemsize
        flat, origin = flatten(array, _BYTES if is_index else storage_dtype(array.dtype))
        steps = array.strides if is_index else tuple(s // unit for s in array.strides)
        flats.append(flat)
        origins.append(origin)
        class_strides.append(0 if class_axis is None else steps[class_axis])
        strides.append(without(steps, class_axis))
    return flats, geometry(shape, n_classes, tile, tuple(origins), tuple(class_strides), tuple(strides), options)


def readable_pieces(
    inputs: tuple[Operand, ...], result: Operand, dtype: np.dtype[Any]
) -> Iterator[tuple[Operand, ...]]:
    """The inputs, and the result that goes with them, as the kernels can read them.

    Where all inputs lie well that is themselves, once. Else it is piece after piece of the rows, the inputs copied
    (integers that are no class indices as ``dtype``), the result as a view.
    """
    if all(a.dtype.isnative if is_index else lies_well(a) for a, _, is_index in inputs):
        yield (*inputs, result)
        return
    array, class_axis, _ = inputs[0]
    for cut in pieces(array.shape, () if class_axis is None else (class_axis,)):
        row_cut = without(cut, class_axis)
        copies = []
        for source, axis, is_index in inputs:
            native = source.dtype.newbyteorder("=") if is_index or is_floating(source.dtype) else dtype
            copies.append(
                Operand(np.array(source[row_cut if axis is None else cut], native, order="C"), axis, is_index)
            )
        # (With the ellipsis, an index of a 0-d array gives a view too.)
        piece = (
            result.array[(*(row_cut if result.class_axis is None else cut), ...)] if result.array.size else result.array
        )
        yield (*copies, Operand(piece, result.class_axis))


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
