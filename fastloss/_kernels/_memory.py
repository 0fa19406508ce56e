"""Memory that a kernel borrows: the arrays of its caller as flat memory, and scratch cut out of one piece.

Numba makes an object of its own of every array that a function gets from Python, and counts references to it: six
arrays take as long as the losses of a row. And it hands an array to every function that is called as seven words or
more, which LLVM has to look through. A kernel needs no more than where an array lies and how long it is, and its caller
holds the array as long as the kernel runs. So a kernel is compiled for :class:`Memory` arguments, each of which is any
C-contiguous, aligned array (else a BufferError is raised), seen as flat memory of the dtype in the signature, be it the
array's or not.

Memory is indexed and sliced like an array, but an index counts from its beginning, never from its end, and is not
checked (with ``NUMBA_BOUNDSCHECK=1`` it is), and a slice begins within it.

With ``NUMBA_DISABLE_JIT=1`` the same names work on NumPy arrays.
"""

import operator

import numpy as np
from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.core.imputils import lower_builtin, lower_getattr
from numba.core.pythonapi import NativeValue
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global, signature
from numba.extending import intrinsic, models, register_model, unbox
from numba.np.numpy_support import from_dtype

from fastloss._kernels._compiler import field

__all__ = ["allocate", "data_and_length", "memory_type", "release", "take", "take_rows"]

# Every piece of scratch begins on a cache line's border. Off it, every other vector would touch two lines: a tile of
# 100 classes takes 1.4 times as long.
CACHE_LINE = 64

# Whether kernels are compiled for one of AMD's Zen, where memory is best asked for in other ways than on Intel's CPUs.
# Only speed depends on it.
IS_ZEN = (config.CPU_NAME or binding.get_host_cpu_name()).startswith("znver")

# Where the members of an array object lie, behind what every Python object begins with, and the size of an item in its
# dtype: NumPy's ndarraytypes.h (PyArrayObject_fields; _PyArray_DescrNumPy2, and PyArray_Descr of NumPy 1).
_HEAD = object.__basicsize__
_DATA, _NDIM, _SHAPE, _DTYPE, _FLAGS = _HEAD, _HEAD + 8, _HEAD + 16, _HEAD + 40, _HEAD + 48
_IS_NUMPY_1 = np.__version__.startswith("1.")
_PLAIN = 0x1 | 0x100  # C-contiguous, aligned
_ITEMSIZE = _HEAD + (16 if _IS_NUMPY_1 else 24)


_WORD, _BYTES = ir.IntType(64), ir.IntType(8).as_pointer()


class Memory(types.Type):
    """Numba type of contiguous elements of ``dtype`` along one or two axes, that somebody else owns."""

    def __init__(self, dtype, ndim):
        self.dtype, self.ndim = dtype, ndim
        super().__init__(name=f"Memory({dtype}, {ndim})")


@register_model(Memory)
class _MemoryModel(models.StructModel):
    """The first element, and the lengths of the axes."""

    def __init__(self, dmm, fe_type):
        lengths = [(f"length{axis}", types.intp) for axis in range(fe_type.ndim)]
        super().__init__(dmm, fe_type, [("data", types.CPointer(fe_type.dtype)), *lengths])


def _make(context, builder, memory_type, data, lengths):
    kind = context.get_value_type(memory_type)
    value = builder.insert_value(ir.Constant(kind, ir.Undefined), builder.bitcast(data, kind.elements[0]), 0)
    for axis, length in enumerate(lengths):
        value = builder.insert_value(value, length, 1 + axis)
    return value


def data_and_length(context, builder, type_, value):
    """Where the elements of one-dimensional memory, or of a C-contiguous array, lie, and how many there are."""
    if isinstance(type_, Memory):
        return field(builder, value, 0), field(builder, value, 1)
    array = context.make_array(type_)(context, builder, value)
    return array.data, array.nitems


# ---------------------------------------------------------------------------------------------------- arguments


def memory_type(dtype):
    """The type of an argument of a NumPy dtype; of a tuple of them, a tuple."""
    if isinstance(dtype, tuple):
        return types.BaseTuple.from_types(tuple(map(memory_type, dtype)))
    return Memory(from_dtype(dtype), 1)


@unbox(Memory)
def _unbox(memory_type, array, c):
    builder, word, half = c.builder, _WORD, ir.IntType(32)

    def member(object_, offset, kind):
        address = builder.gep(object_, [ir.Constant(word, offset)])
        return builder.load(builder.bitcast(address, kind.as_pointer()))

    shape = member(array, _SHAPE, word.as_pointer())
    itemsize = member(member(array, _DTYPE, _BYTES), _ITEMSIZE, half if _IS_NUMPY_1 else word)
    n_bytes = cgutils.alloca_once_value(builder, builder.sext(itemsize, word) if _IS_NUMPY_1 else itemsize)
    n_axes = builder.sext(member(array, _NDIM, half), word)
    with cgutils.for_range(builder, n_axes, intp=word) as loop:
        length = builder.load(builder.gep(shape, [loop.index]))
        builder.store(builder.mul(builder.load(n_bytes), length), n_bytes)
    itemsize = ir.Constant(word, memory_type.dtype.bitwidth // 8)
    data, size = member(array, _DATA, _BYTES), builder.udiv(builder.load(n_bytes), itemsize)
    plain = ir.Constant(half, _PLAIN)
    is_odd = builder.icmp_unsigned("!=", builder.and_(member(array, _FLAGS, half), plain), plain)
    with builder.if_then(is_odd, likely=False):
        c.pyapi.err_set_string("PyExc_BufferError", "an array that is not C-contiguous and aligned")
    return NativeValue(_make(c.context, builder, memory_type, data, [size]), is_error=is_odd)


# ------------------------------------------------------------------------------------------- elements and slices


def _check(context, builder, comparison, index, length):
    if config.BOUNDSCHECK:
        is_inside = builder.icmp_unsigned(comparison, index, length)
        with builder.if_then(builder.not_(is_inside), likely=False):
            context.call_conv.return_user_exc(builder, IndexError, ("index outside its memory",))


def _row_pointer(context, builder, memory_type, memory, indices):
    """Pointer to the element, or the first one of the row, that as many indices choose."""
    offset = None
    for axis, index in enumerate(indices):
        _check(context, builder, "<", index, field(builder, memory, 1 + axis))
        offset = index if offset is None else builder.add(offset, index)
        if axis + 1 < memory_type.ndim:
            offset = builder.mul(offset, field(builder, memory, 2 + axis))
    return builder.gep(field(builder, memory, 0), [offset], inbounds=True)


def _element_type(memory, index):
    """The types of what an index chooses and of the index, or None."""
    if isinstance(index, types.Integer):
        return (memory.dtype if memory.ndim == 1 else Memory(memory.dtype, memory.ndim - 1)), types.intp
    if isinstance(index, types.SliceType) and not index.has_step and memory.ndim == 1:
        return memory, types.slice2_type
    if isinstance(index, types.BaseTuple) and len(index) == memory.ndim:
        return memory.dtype, types.UniTuple(types.intp, memory.ndim)
    return None


@infer_global(operator.getitem)
class _GetTemplate(AbstractTemplate):
    def generic(self, args, kws):
        found = _element_type(*args) if isinstance(args[0], Memory) else None
        return found and signature(found[0], args[0], found[1])


@infer_global(operator.setitem)
class _SetTemplate(AbstractTemplate):
    def generic(self, args, kws):
        found = _element_type(*args[:2]) if isinstance(args[0], Memory) else None
        return found and signature(types.void, args[0], found[1], args[0].dtype)


@lower_builtin(operator.getitem, Memory, types.Integer)
def _get(context, builder, sig, args):
    pointer = _row_pointer(context, builder, sig.args[0], args[0], args[1:2])
    if sig.args[0].ndim == 1:
        return context.unpack_value(builder, sig.return_type, pointer)
    return _make(context, builder, sig.return_type, pointer, [field(builder, args[0], 2)])


@lower_builtin(operator.getitem, Memory, types.BaseTuple)
def _get_of_rows(context, builder, sig, args):
    indices = cgutils.unpack_tuple(builder, args[1])
    return context.unpack_value(builder, sig.return_type, _row_pointer(context, builder, sig.args[0], args[0], indices))


def _bounds(context, builder, memory, slice_type, slice_):
    """The bounds of a slice, which begins within the memory; without a stop it has the largest number."""
    bounds = context.make_helper(builder, slice_type, slice_)
    length = field(builder, memory, 1)
    is_inside = builder.icmp_signed("<", bounds.stop, length)
    _check(context, builder, "<=", bounds.start, length)
    return bounds.start, builder.select(is_inside, bounds.stop, length)


@lower_builtin(operator.getitem, Memory, types.SliceType)
def _get_slice(context, builder, sig, args):
    start, stop = _bounds(context, builder, args[0], sig.args[1], args[1])
    pointer = builder.gep(field(builder, args[0], 0), [start], inbounds=True)
    return _make(context, builder, sig.return_type, pointer, [builder.sub(stop, start)])


@lower_builtin(operator.setitem, Memory, types.Integer, types.Any)
def _set(context, builder, sig, args):
    context.pack_value(builder, sig.args[2], args[2], _row_pointer(context, builder, sig.args[0], args[0], args[1:2]))


@lower_builtin(operator.setitem, Memory, types.BaseTuple, types.Any)
def _set_of_rows(context, builder, sig, args):
    indices = cgutils.unpack_tuple(builder, args[1])
    context.pack_value(builder, sig.args[2], args[2], _row_pointer(context, builder, sig.args[0], args[0], indices))


@lower_builtin(operator.setitem, Memory, types.SliceType, types.Any)
def _set_slice(context, builder, sig, args):
    start, stop = _bounds(context, builder, args[0], sig.args[1], args[1])
    with cgutils.for_range_slice(builder, start, stop, _WORD(1), inc=True) as (index, _):
        context.pack_value(builder, sig.args[2], args[2], _row_pointer(context, builder, sig.args[0], args[0], [index]))


@infer_global(len)
class _LenTemplate(AbstractTemplate):
    def generic(self, args, kws):
        return signature(types.intp, args[0]) if isinstance(args[0], Memory) else None


@lower_builtin(len, Memory)
def _len(context, builder, sig, args):
    return field(builder, args[0], 1)


@infer_getattr
class _MemoryAttributes(AttributeTemplate):
    key = Memory

    def resolve_itemsize(self, memory):
        return types.intp


@lower_getattr(Memory, "itemsize")
def _itemsize(context, builder, memory_type, memory):
    return _WORD(memory_type.dtype.bitwidth // 8)


# ------------------------------------------------------------------------------------------------------ scratch


@intrinsic
def allocate(typingctx, n_bytes):
    """New memory as uint8, for :func:`release` to free."""
    result = Memory(types.uint8, 1)

    def codegen(context, builder, sig, args):
        function = ir.FunctionType(_BYTES, [_WORD])
        data = builder.call(cgutils.get_or_insert_function(builder.module, function, "NRT_Allocate"), args)
        cgutils.guard_memory_error(context, builder, data, msg="no memory for the scratch of a thread")
        return _make(context, builder, result, data, args)

    return result(types.int64), codegen


@intrinsic
def release(typingctx, memory):
    """Free what :func:`allocate` gave."""

    def codegen(context, builder, sig, args):
        function = ir.FunctionType(ir.VoidType(), [_BYTES])
        free = cgutils.get_or_insert_function(builder.module, function, "NRT_Free")
        builder.call(free, [field(builder, args[0], 0)])
        return context.get_dummy_value()

    return types.void(memory), codegen


def _scratch_type(like, n_axes):
    """The type of scratch for values like a scalar, or like those of an array."""
    return Memory(like if isinstance(like, types.Number) else like.dtype, n_axes)


def _scratch_pointer(builder, memory, offset):
    start = builder.ptrtoint(field(builder, memory, 0), offset.type)
    start = builder.add(start, ir.Constant(offset.type, CACHE_LINE - 1))
    start = builder.and_(start, ir.Constant(offset.type, -CACHE_LINE))
    return builder.inttoptr(builder.add(start, offset), _BYTES)


@intrinsic
def take(typingctx, memory, offset, size, like):
    """``size`` elements like ``like`` out of uint8 memory, ``offset`` bytes behind its first cache line's border."""
    result = _scratch_type(like, 1)

    def codegen(context, builder, sig, args):
        return _make(context, builder, result, _scratch_pointer(builder, *args[:2]), args[2:3])

    return result(memory, types.int64, types.int64, like), codegen


@intrinsic
def take_rows(typingctx, memory, offset, n_rows, size, like):
    """:func:`take` of a number of rows of ``size`` elements each."""
    result = _scratch_type(like, 2)

    def codegen(context, builder, sig, args):
        return _make(context, builder, result, _scratch_pointer(builder, *args[:2]), args[2:4])

    return result(memory, types.int64, types.int64, types.int64, like), codegen


if config.DISABLE_JIT:

    def allocate(n_bytes):
        return np.empty(n_bytes, np.uint8)

    def release(memory):
        return None

    def take(memory, offset, size, like):
        dtype = np.asarray(like).dtype
        start = -memory.ctypes.data % CACHE_LINE + offset
        return memory[start : start + size * dtype.itemsize].view(dtype)

    def take_rows(memory, offset, n_rows, size, like):
        return take(memory, offset, n_rows * size, like).reshape(n_rows, size)
