"""Memory that a kernel borrows: the arrays of its caller as flat memory, and scratch cut out of one piece.

Numba makes an object of its own of every array that a function gets from Python, and counts references to it: six
arrays take as long as the losses of a row. A kernel needs no more than where an array lies and how long it is, and its
caller holds the array as long as the kernel runs. So a kernel is compiled for :class:`Flat` arguments, each of which is
any C-contiguous, aligned array (else a BufferError is raised), seen as flat memory of the dtype in the signature, be it
the array's or not; within the kernel :func:`memory_of` makes of it the one-dimensional array that the rest of the code
knows, which is not counted.

With ``NUMBA_DISABLE_JIT=1`` the same names work on NumPy arrays.
"""

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.pythonapi import NativeValue
from numba.extending import intrinsic, models, register_model, unbox
from numba.np.arrayobj import populate_array
from numba.np.numpy_support import from_dtype

__all__ = ["flat_type", "memory_of", "take", "take_rows"]

# Every piece of scratch begins on a cache line's border. Off it, every other vector would touch two lines: a tile of
# 100 classes takes 1.4 times as long.
CACHE_LINE = 64

# Where the members of an array object lie, behind what every Python object begins with, and the size of an item in its
# dtype: NumPy's ndarraytypes.h (PyArrayObject_fields; _PyArray_DescrNumPy2, and PyArray_Descr of NumPy 1).
_HEAD = object.__basicsize__
_DATA, _NDIM, _SHAPE, _DTYPE, _FLAGS = _HEAD, _HEAD + 8, _HEAD + 16, _HEAD + 40, _HEAD + 48
_IS_NUMPY_1 = np.__version__.startswith("1.")
_PLAIN = 0x1 | 0x100  # C-contiguous, aligned
_ITEMSIZE = _HEAD + (16 if _IS_NUMPY_1 else 24)


class Flat(types.Type):
    """Numba type of an argument whose memory is seen as elements of ``dtype``."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Flat({dtype})")

    @property
    def array(self):
        return types.Array(self.dtype, 1, "C")


def flat_type(dtype):
    """The type of an argument of a NumPy dtype; of a tuple of them, a tuple."""
    if isinstance(dtype, tuple):
        return types.BaseTuple.from_types(tuple(map(flat_type, dtype)))
    return Flat(from_dtype(dtype))


@register_model(Flat)
class _FlatModel(models.StructModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, [("data", types.CPointer(fe_type.dtype)), ("size", types.intp)])


@unbox(Flat)
def _unbox(flat, array, c):
    builder, word, half = c.builder, ir.IntType(64), ir.IntType(32)

    def member(object_, offset, kind):
        address = builder.gep(object_, [ir.Constant(word, offset)])
        return builder.load(builder.bitcast(address, kind.as_pointer()))

    byte_pointer = ir.IntType(8).as_pointer()
    shape = member(array, _SHAPE, word.as_pointer())
    itemsize = member(member(array, _DTYPE, byte_pointer), _ITEMSIZE, half if _IS_NUMPY_1 else word)
    n_bytes = cgutils.alloca_once_value(builder, builder.sext(itemsize, word) if _IS_NUMPY_1 else itemsize)
    n_axes = builder.sext(member(array, _NDIM, half), word)
    with cgutils.for_range(builder, n_axes, intp=word) as loop:
        length = builder.load(builder.gep(shape, [loop.index]))
        builder.store(builder.mul(builder.load(n_bytes), length), n_bytes)
    native = cgutils.create_struct_proxy(flat)(c.context, builder)
    native.data = builder.bitcast(member(array, _DATA, byte_pointer), native.data.type)
    native.size = builder.udiv(builder.load(n_bytes), ir.Constant(word, flat.dtype.bitwidth // 8))
    plain = ir.Constant(half, _PLAIN)
    is_odd = builder.icmp_unsigned("!=", builder.and_(member(array, _FLAGS, half), plain), plain)
    with builder.if_then(is_odd, likely=False):
        c.pyapi.err_set_string("PyExc_BufferError", "an array that is not C-contiguous and aligned")
    return NativeValue(native._getvalue(), is_error=is_odd)


def _array_of(context, builder, array_type, data, shape):
    """An array of memory that somebody else owns."""
    word = context.get_value_type(types.intp)
    itemsize = ir.Constant(word, array_type.dtype.bitwidth // 8)
    strides = [itemsize]
    for length in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], length))
    array = context.make_array(array_type)(context, builder)
    data = builder.bitcast(data, array.data.type)
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=itemsize, meminfo=None)
    return array._getvalue()


@intrinsic
def memory_of(typingctx, argument):
    """The one-dimensional array of an argument, the tuple of them of a tuple."""
    is_tuple = isinstance(argument, types.BaseTuple)
    flats = tuple(argument) if is_tuple else (argument,)
    result = types.BaseTuple.from_types([flat.array for flat in flats]) if is_tuple else argument.array

    def codegen(context, builder, sig, args):
        values = cgutils.unpack_tuple(builder, args[0]) if is_tuple else args
        arrays = []
        for flat, value in zip(flats, values, strict=True):
            native = cgutils.create_struct_proxy(flat)(context, builder, value)
            arrays.append(_array_of(context, builder, flat.array, native.data, [native.size]))
        return context.make_tuple(builder, result, arrays) if is_tuple else arrays[0]

    return result(argument), codegen


def _scratch_type(like, n_axes):
    """The type of scratch for values like a scalar, or like those of an array."""
    return types.Array(like.dtype if isinstance(like, types.Array) else like, n_axes, "C")


def _scratch_pointer(context, builder, memory_type, memory, offset):
    start = builder.ptrtoint(context.make_array(memory_type)(context, builder, memory).data, offset.type)
    start = builder.add(start, ir.Constant(offset.type, CACHE_LINE - 1))
    start = builder.and_(start, ir.Constant(offset.type, -CACHE_LINE))
    return builder.inttoptr(builder.add(start, offset), ir.IntType(8).as_pointer())


@intrinsic
def take(typingctx, memory, offset, size, like):
    """``size`` elements like ``like`` out of a uint8 array, ``offset`` bytes behind its first cache line's border; the
    array must be alive as long as they are in use.
    """
    result = _scratch_type(like, 1)

    def codegen(context, builder, sig, args):
        return _array_of(context, builder, result, _scratch_pointer(context, builder, memory, *args[:2]), [args[2]])

    return result(memory, types.int64, types.int64, like), codegen


@intrinsic
def take_rows(typingctx, memory, offset, n_rows, size, like):
    """:func:`take` of a number of rows of ``size`` elements each."""
    result = _scratch_type(like, 2)

    def codegen(context, builder, sig, args):
        pointer = _scratch_pointer(context, builder, memory, *args[:2])
        return _array_of(context, builder, result, pointer, [args[2], args[3]])

    return result(memory, types.int64, types.int64, types.int64, like), codegen


if config.DISABLE_JIT:

    def memory_of(argument):
        return argument

    def take(memory, offset, size, like):
        dtype = np.asarray(like).dtype
        start = -memory.ctypes.data % CACHE_LINE + offset
        return memory[start : start + size * dtype.itemsize].view(dtype)

    def take_rows(memory, offset, n_rows, size, like):
        return take(memory, offset, n_rows * size, like).reshape(n_rows, size)
