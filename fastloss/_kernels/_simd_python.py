"""The names of :mod:`fastloss._kernels._simd` on NumPy arrays, for ``NUMBA_DISABLE_JIT=1``.

A vector is an array of 16 float32 or int32, or of 8 float64 or int64; the operators are NumPy's own.
"""

import numpy as np

__all__ = [
    "any_lane",
    "copy",
    "fence",
    "first_lane",
    "fma",
    "from_bits",
    "integer_like",
    "iota",
    "lane_steps",
    "lanes",
    "load",
    "load_columns",
    "load_integer",
    "load_integers",
    "load_one",
    "load_pairs",
    "load_target",
    "load_targets",
    "lowest_bit",
    "mask_bits",
    "negative_zeros_like",
    "next_task",
    "polynomial",
    "polynomial_by_pairs",
    "prefetch",
    "prefetch_l2",
    "scalar",
    "splat",
    "store",
    "store_columns",
    "store_streaming",
    "to_bits",
    "to_border",
    "to_float",
    "tree_max",
    "tree_sum",
    "where",
    "widen",
]

_INTEGER = {np.dtype("f4"): np.int32, np.dtype("f8"): np.int64, np.dtype("i4"): np.int32, np.dtype("i8"): np.int64}
_FLOAT = {np.dtype("i4"): np.float32, np.dtype("i8"): np.float64}


def _dtype(like):
    """The dtype of a scalar; a Python number is what Numba would take it for."""
    if isinstance(like, bool | int):
        return np.dtype("i8")
    return np.dtype(type(like)) if isinstance(like, np.generic) else np.dtype("f8")


def lanes(like):
    return 64 // _dtype(like).itemsize


def scalar(value, like):
    return _dtype(like).type(value)


def splat(value):
    return np.full(lanes(value), value, _dtype(value))


def negative_zeros_like(vector):
    return np.full_like(vector, -0.0)


def iota(like):
    return np.arange(lanes(like), dtype=_INTEGER[_dtype(like)])


def load(array, index, like):
    return _load(array, index, lanes(like), _dtype(like))


def load_columns(array, offsets, first, column, like):
    starts = offsets[first : first + lanes(like)] + column
    if starts.min() < 0 or starts.max() > len(array) - 4:
        raise IndexError("vector outside its array")
    return tuple(array[starts + i] for i in range(4))


def store_columns(array, offsets, first, column, *vectors):
    starts = offsets[first : first + len(vectors[0])] + column
    if starts.min() < 0 or starts.max() > len(array) - 4:
        raise IndexError("vector outside its array")
    for i, values in enumerate(vectors):
        array[starts + i] = values


def copy(array, index, source, at, like):
    count = lanes(like)
    if min(index, at) < 0 or index > len(array) - count or at > len(source) - count:
        raise IndexError("vector outside its array")
    array[index : index + count] = source[at : at + count]
    return load(source, at, like)


def prefetch(array, index, distance):
    pass


prefetch_l2 = prefetch


def load_pairs(array, index, like):
    count = 2 * lanes(like)
    if not 0 <= index <= len(array) - count:
        raise IndexError("vector outside its array")
    return array[index : index + count : 2], array[index + 1 : index + count : 2]


def load_one(array, index, like):
    return _load(array, index, 1, _dtype(like))[0]


def _load(array, index, count, dtype):
    if not 0 <= index <= len(array) - count:
        raise IndexError("vector outside its array")
    values = array[index : index + count]
    if dtype.kind == "f" and array.dtype == np.uint16:
        values = values.view(np.float16)
    elif dtype.kind == "f" and array.dtype == np.int16:
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(dtype)


def load_integer(data, offset, like):
    size = np.dtype(type(like)).itemsize
    if not 0 <= offset <= len(data) - size:
        raise IndexError("integer outside its array")
    return data[offset : offset + size].view(type(like))[0]


def load_integers(data, offset, like):
    raw = data.view(np.uint8)
    size = 8 * np.dtype(type(like)).itemsize
    if not 0 <= offset <= len(raw) - size:
        raise IndexError("integers outside their array")
    return raw[offset : offset + size].view(type(like)).astype(np.int64)


_KINDS = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.int64)


def load_target(data, offset, kind):
    return np.int64(load_integer(data, offset, _KINDS[kind](0)))


def load_targets(data, offset, kind):
    return load_integers(data, offset, _KINDS[kind](0))


def lane_steps(step):
    return np.arange(8) * np.int64(step)


def integer_like(value, like):
    return np.int64(value).astype(_INTEGER[_dtype(like)])


def store(array, index, value):
    if not 0 <= index <= len(array) - len(value):
        raise IndexError("vector outside its array")
    narrows = (array.dtype, value.dtype) == (np.int32, np.int64)
    if array.dtype != value.dtype and (array.dtype.kind, value.dtype.kind) != ("f", "f") and not narrows:
        raise TypeError(f"a vector of {value.dtype} does not go into an array of {array.dtype}")
    array[index : index + len(value)] = value


def store_streaming(array, index, value):
    assert array.dtype == value.dtype
    assert to_border(array, index) == 0
    store(array, index, value)


def to_border(array, index):
    return -(array.ctypes.data + index * array.itemsize) % 64 // array.itemsize


def fence():
    pass


def fma(a, b, c):
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def polynomial(*coefficients):
    def evaluate(x):
        result = np.full_like(x, coefficients[-1])
        for c in reversed(coefficients[:-1]):
            result = fma(result, x, np.full_like(x, c))
        return result

    return evaluate


def polynomial_by_pairs(*coefficients):
    def evaluate(x, square):
        pairs = [coefficients[i : i + 2] for i in range(0, len(coefficients), 2)]
        terms = [fma(x, splat(pair[1]), splat(pair[0])) if len(pair) == 2 else splat(pair[0]) for pair in pairs]
        result = terms[-1]
        for term in reversed(terms[:-1]):
            result = fma(result, square, term)
        return result

    return evaluate


def where(mask, a, b):
    return np.where(mask, a, b)


def widen(value):
    return value[:8].astype(np.float64), value[8:].astype(np.float64)


def to_bits(value):
    return value.view(_INTEGER[value.dtype])


def from_bits(bits):
    return bits.view(_FLOAT[bits.dtype])


def to_float(value):
    return value.astype(_FLOAT[value.dtype])


def _tree(value, combine):
    while len(value) > 1:
        half = len(value) // 2
        value = combine(value[:half], value[half:])
    return value[0]


def tree_sum(value):
    return _tree(value, np.add)


def tree_max(value):
    return _tree(value, lambda a, b: np.where(a > b, a, b))


def first_lane(value):
    return value[0]


def mask_bits(mask):
    return sum(1 << i for i, holds in enumerate(mask) if holds)


def lowest_bit(bits):
    return int(bits & -bits).bit_length() - 1


def any_lane(mask):
    return bool(mask.any())


def next_task(counter):
    task = int(counter[0])
    counter[0] += 1
    return task
