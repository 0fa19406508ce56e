"""Vectors as values: 64 bytes of float32, float64 or integers that a Numba kernel can hold in a register.

Why not leave it to the auto-vectoriser: the order of addition is part of fastloss's contract (the same bits for
any batch, layout and CPU), and a loop that LLVM may or may not vectorise, in an order of its own, cannot promise
it. A kernel written with these vectors does the same arithmetic on every machine: LLVM splits a vector into as many
registers as the CPU needs (one AVX-512, two AVX, four SSE or NEON), which changes the speed and never the bits.
It also compiles sooner, because there is no loop left to analyse.

A vector of float32 (or int32) has 16 lanes, one of float64 (or int64) has 8: :func:`lanes`. The kernels are
generic in the *compute type*: they take a zero of that type, ``like``, and every constructor here follows it.

Operators: ``+ - *`` and unary minus on vectors of one type; ``< <= > >= == !=`` give a mask; ``& | ^`` work on masks
and integers, ``<< >>`` (arithmetic) shift integers by a vector of counts. No fast-math flag is ever set: each operation
is the IEEE operation, each :func:`fma` is fused on every CPU.

With ``NUMBA_DISABLE_JIT=1`` the same names work on NumPy arrays of 16 or 8 elements, so that every kernel can be
stepped through, and covered, as Python.
"""

import operator

from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

from fastloss._kernels._memory import data_and_length

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

VECTOR_BYTES = 64


class Vector(types.Type):
    """Numba type of a vector; ``dtype`` is boolean for the mask that a comparison gives."""

    def __init__(self, dtype, count):
        self.dtype = dtype
        self.count = count
        super().__init__(name=f"Vector({dtype}, {count})")

    @classmethod
    def of(cls, dtype):
        return cls(dtype, VECTOR_BYTES * 8 // dtype.bitwidth)

    @property
    def integer(self):
        """The integer vector with the same lanes."""
        return Vector(types.int32 if self.dtype.bitwidth == 32 else types.int64, self.count)

    @property
    def mask(self):
        return Vector(types.boolean, self.count)

    @property
    def is_float(self):
        return isinstance(self.dtype, types.Float)


def _scalar_ir(dtype):
    if dtype == types.float32:
        return ir.FloatType()
    if dtype == types.float64:
        return ir.DoubleType()
    return ir.IntType(1 if dtype == types.boolean else dtype.bitwidth)


def _vector_ir(vector):
    return ir.VectorType(_scalar_ir(vector.dtype), vector.count)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _vector_ir(fe_type))


# ---------------------------------------------------------------------------------------------- operators

_ARITHMETIC = {
    operator.add: ("fadd", "add"),
    operator.sub: ("fsub", "sub"),
    operator.mul: ("fmul", "mul"),
    operator.truediv: ("fdiv", None),
    operator.and_: (None, "and_"),
    operator.or_: (None, "or_"),
    operator.xor: (None, "xor"),
    operator.lshift: (None, "shl"),
    operator.rshift: (None, "ashr"),
}
_COMPARISONS = {
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
}


def _define_binary(op, result, emit):
    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(result(args[0]), *args)
            return None

    @lower_builtin(op, Vector, Vector)
    def _lower(context, builder, sig, args):
        return emit(builder, sig.args[0], *args)


def _arithmetic(names):
    def emit(builder, vector, a, b):
        return getattr(builder, names[0] if vector.is_float else names[1])(a, b)

    return emit


def _comparison(symbol):
    def emit(builder, vector, a, b):
        if not vector.is_float:
            return builder.icmp_signed(symbol, a, b)
        if symbol == "!=":  # true for NaN, as in IEEE 754 and Python
            return builder.fcmp_unordered(symbol, a, b)
        return builder.fcmp_ordered(symbol, a, b)

    return emit


for _op, _names in _ARITHMETIC.items():
    _define_binary(_op, lambda vector: vector, _arithmetic(_names))
for _op, _symbol in _COMPARISONS.items():
    _define_binary(_op, lambda vector: vector.mask, _comparison(_symbol))


@infer_global(operator.neg)
class _NegateTemplate(AbstractTemplate):
    def generic(self, args, kws):
        return signature(args[0], args[0]) if isinstance(args[0], Vector) else None


@lower_builtin(operator.neg, Vector)
def _negate(context, builder, sig, args):
    return builder.fneg(args[0])


# ------------------------------------------------------------------------------------ helpers of the lowering


def _constant(vector, values):
    scalar = _scalar_ir(vector.dtype)
    return ir.Constant(_vector_ir(vector), [ir.Constant(scalar, v) for v in values])


def _splat_ir(builder, vector, scalar):
    kind = _vector_ir(vector)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def _halves(builder, value, count):
    """The low and the high half of a vector value."""
    undefined = ir.Constant(value.type, ir.Undefined)
    index = ir.VectorType(ir.IntType(32), count // 2)
    low = ir.Constant(index, list(range(count // 2)))
    high = ir.Constant(index, list(range(count // 2, count)))
    return builder.shuffle_vector(value, undefined, low), builder.shuffle_vector(value, undefined, high)


def _element_pointer(context, builder, array_type, array, index, count):
    """Pointer to ``count`` elements of a C-contiguous array from ``index`` on, as a pointer to a vector."""
    data, length = data_and_length(context, builder, array_type, array)
    if config.BOUNDSCHECK:
        inside = builder.and_(
            builder.icmp_signed(">=", index, ir.Constant(index.type, 0)),
            builder.icmp_signed("<=", builder.add(index, ir.Constant(index.type, count)), length),
        )
        with builder.if_then(builder.not_(inside), likely=False):
            context.call_conv.return_user_exc(builder, IndexError, ("vector outside its array",))
    pointer = builder.gep(data, [index], inbounds=True)
    scalar = context.get_data_type(array_type.dtype)
    return builder.bitcast(pointer, ir.VectorType(scalar, count).as_pointer())


def _byte_pointer(context, builder, array_type, array, offset, size):
    """Pointer to ``size`` bytes, ``offset`` bytes into a C-contiguous array."""
    data, length = data_and_length(context, builder, array_type, array)
    if config.BOUNDSCHECK:
        end = builder.add(offset, ir.Constant(offset.type, size))
        outside = builder.or_(
            builder.icmp_signed("<", offset, ir.Constant(offset.type, 0)),
            builder.icmp_signed(
                ">", end, builder.mul(length, ir.Constant(length.type, array_type.dtype.bitwidth // 8))
            ),
        )
        with builder.if_then(outside, likely=False):
            context.call_conv.return_user_exc(builder, IndexError, ("integers outside their array",))
    return builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [offset], inbounds=True)


def _has_half_conversion(context):
    """Whether the target CPU converts float16 in hardware (without it LLVM calls a function that may not exist)."""
    features = context.codegen()._tm_features
    return "+f16c" in features or "+avx512f" in features


def _widen_float16(builder, value, count, half_conversion):
    """uint16 lanes holding float16 to float32 lanes, exactly, NaN and subnormal numbers included."""
    i32 = ir.VectorType(ir.IntType(32), count)
    f32 = ir.VectorType(ir.FloatType(), count)
    if half_conversion:
        return builder.fpext(builder.bitcast(value, ir.VectorType(ir.HalfType(), count)), f32)

    def constant(v):
        return ir.Constant(i32, [v] * count)

    wide = builder.zext(value, i32)
    sign = builder.shl(builder.and_(wide, constant(0x8000)), constant(16))
    magnitude = builder.shl(builder.and_(wide, constant(0x7FFF)), constant(13))
    # The exponent fields differ by 127 - 15 = 112: one exact multiplication moves subnormal numbers as well.
    scaled = builder.fmul(builder.bitcast(magnitude, f32), ir.Constant(f32, [2.0**112] * count))
    special = builder.icmp_unsigned(">=", magnitude, constant(0x7C00 << 13))
    special_bits = builder.or_(magnitude, constant(0x7F800000))
    bits = builder.select(special, special_bits, builder.bitcast(scaled, i32))
    return builder.bitcast(builder.or_(bits, sign), f32)


def _convert(builder, value, source, target, half_conversion):
    """Lanes of an array's dtype to lanes of the compute type (uint16 is float16, int16 is bfloat16)."""
    count = target.count
    if target.is_float and isinstance(source, types.Integer):
        if source == types.uint16:
            value = _widen_float16(builder, value, count, half_conversion)
        else:
            i32 = ir.VectorType(ir.IntType(32), count)
            bits = builder.shl(builder.zext(value, i32), ir.Constant(i32, [16] * count))
            value = builder.bitcast(bits, ir.VectorType(ir.FloatType(), count))
        source = types.float32
    if source == target.dtype:
        return value
    if target.is_float and source == types.float32:
        return builder.fpext(value, _vector_ir(target))
    if not target.is_float and source == types.int32:
        return builder.sext(value, _vector_ir(target))
    raise TypeError(f"no conversion from lanes of {source} to {target}")


# ------------------------------------------------------------------------------------------------ intrinsics


@intrinsic
def lanes(typingctx, like):
    """Number of lanes of a vector of the scalar ``like``'s type."""

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.IntType(64), Vector.of(like).count)

    return types.int64(like), codegen


@intrinsic
def scalar(typingctx, value, like):
    """A number as a scalar of the compute type of ``like``."""

    def codegen(context, builder, sig, args):
        return context.cast(builder, args[0], sig.args[0], sig.return_type)

    return like(value, like), codegen


@intrinsic
def splat(typingctx, value):
    """A vector with the scalar ``value`` in every lane."""
    vector = Vector.of(value)

    def codegen(context, builder, sig, args):
        return _splat_ir(builder, vector, args[0])

    return vector(value), codegen


@intrinsic
def negative_zeros_like(typingctx, vector):
    """A vector of -0.0, which an addition leaves out at compile time (+0.0 would change a -0.0)."""

    def codegen(context, builder, sig, args):
        return _constant(vector, [-0.0] * vector.count)

    return vector(vector), codegen


@intrinsic
def iota(typingctx, like):
    """The integer vector 0, 1, 2, ... with the lanes of a vector of ``like``'s type."""
    vector = Vector.of(like).integer

    def codegen(context, builder, sig, args):
        return _constant(vector, range(vector.count))

    return vector(like), codegen


@intrinsic
def load(typingctx, array, index, like):
    """``lanes(like)`` elements of the 1-D contiguous ``array`` from ``index`` on, converted exactly to ``like``'s type.

    uint16 elements are float16, int16 elements bfloat16. The address need not be aligned.
    """
    vector = Vector.of(like)

    def codegen(context, builder, sig, args):
        pointer = _element_pointer(context, builder, array, args[0], args[1], vector.count)
        value = builder.load(pointer, align=array.dtype.bitwidth // 8)
        return _convert(builder, value, array.dtype, vector, _has_half_conversion(context))

    return vector(array, types.int64, like), codegen


@intrinsic
def copy(typingctx, array, index, source, at, like):
    """Copy ``lanes(like)`` elements, as they are, from one array to another of its dtype; what :func:`load` gives of
    them.
    """
    vector = Vector.of(like)

    def codegen(context, builder, sig, args):
        value = builder.load(
            _element_pointer(context, builder, source, args[2], args[3], vector.count),
            align=source.dtype.bitwidth // 8,
        )
        pointer = _element_pointer(context, builder, array, args[0], args[1], vector.count)
        builder.store(value, pointer, align=array.dtype.bitwidth // 8)
        return _convert(builder, value, source.dtype, vector, _has_half_conversion(context))

    return vector(array, types.int64, source, types.int64, like), codegen


def _make_prefetch(locality):
    def codegen(context, builder, sig, args):
        byte = ir.IntType(8).as_pointer()
        i32 = ir.IntType(32)
        element = builder.gep(data_and_length(context, builder, sig.args[0], args[0])[0], [args[1]])
        address = builder.gep(builder.bitcast(element, byte), [args[2]])
        hint = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32]), "llvm.prefetch.p0"
        )
        builder.call(hint, [address, i32(0), i32(locality), i32(1)])  # read, how near, data
        return context.get_dummy_value()

    return codegen


@intrinsic
def prefetch(typingctx, array, index, distance):
    """Ask for the cache line ``distance`` bytes behind an element. It may lie outside the array: nothing is read."""
    return types.void(array, types.int64, types.int64), _make_prefetch(3)


@intrinsic
def prefetch_l2(typingctx, array, index, distance):
    """:func:`prefetch` into the second-level cache only: for scattered lines, of which the first level can wait for
    some twenty at a time, the second for more (a line of every 400 bytes comes in 2.5 ns instead of 9).
    """
    return types.void(array, types.int64, types.int64), _make_prefetch(2)


def _transpose_fours(builder, a, b, c, d):
    """Transpose the 4 x 4 block that each group of four lanes of four vectors is; the way back is the same."""
    count = a.type.count
    index = ir.VectorType(ir.IntType(32), count)

    def pick(a, b, pattern):
        """In each group of four lanes the given elements of that group of a (0 to 3) and b (4 to 7)."""
        lanes_ = [4 * g + i if i < 4 else count + 4 * g + i - 4 for g in range(count // 4) for i in pattern]
        return builder.shuffle_vector(a, b, ir.Constant(index, lanes_))

    ab_low, cd_low = pick(a, b, (0, 4, 1, 5)), pick(c, d, (0, 4, 1, 5))
    ab_high, cd_high = pick(a, b, (2, 6, 3, 7)), pick(c, d, (2, 6, 3, 7))
    return [
        pick(ab_low, cd_low, (0, 1, 4, 5)),
        pick(ab_low, cd_low, (2, 3, 6, 7)),
        pick(ab_high, cd_high, (0, 1, 4, 5)),
        pick(ab_high, cd_high, (2, 3, 6, 7)),
    ]


@intrinsic
def load_columns(typingctx, array, offsets, first, column, like):
    """Four vectors, the elements ``column .. column + 4`` of ``lanes(like)`` rows that begin at ``offsets[first:]``.

    The 4 x 4 blocks are transposed in registers: some 24 operations for 64 elements where single loads and stores take
    128.
    """
    count = Vector.of(like).count
    vector = Vector(array.dtype, count)
    groups = range(count // 4)

    def codegen(context, builder, sig, args):
        first_offset = builder.bitcast(
            _element_pointer(context, builder, offsets, args[1], args[2], count), ir.IntType(64).as_pointer()
        )

        def row(i):
            at = builder.load(builder.gep(first_offset, [ir.Constant(ir.IntType(64), i)], inbounds=True))
            pointer = _element_pointer(context, builder, array, args[0], builder.add(at, args[3]), 4)
            return builder.load(pointer, align=array.dtype.bitwidth // 8)

        def join(parts):
            while len(parts) > 1:
                size = parts[0].type.count
                both = ir.Constant(ir.VectorType(ir.IntType(32), 2 * size), list(range(2 * size)))
                parts = [builder.shuffle_vector(a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)]
            return parts[0]

        rows = [join([row(4 * g + j) for g in groups]) for j in range(4)]
        return cgutils.pack_array(builder, _transpose_fours(builder, *rows))

    return types.UniTuple(vector, 4)(array, offsets, types.int64, types.int64, like), codegen


@intrinsic
def load_pairs(typingctx, array, index, like):
    """Two vectors, the even and the odd ones of the ``2 * lanes(like)`` elements from ``index`` on, as they are."""
    count = Vector.of(like).count
    vector = Vector(array.dtype, count)

    def codegen(context, builder, sig, args):
        pointer = _element_pointer(context, builder, array, args[0], args[1], 2 * count)
        both = builder.load(pointer, align=array.dtype.bitwidth // 8)
        undefined = ir.Constant(both.type, ir.Undefined)
        index = ir.VectorType(ir.IntType(32), count)
        picked = [
            builder.shuffle_vector(both, undefined, ir.Constant(index, list(range(first, 2 * count, 2))))
            for first in (0, 1)
        ]
        return cgutils.pack_array(builder, picked)

    return types.UniTuple(vector, 2)(array, types.int64, like), codegen


@intrinsic
def store_columns(typingctx, array, offsets, first, column, a, b, c, d):
    """The way back of :func:`load_columns`: four vectors to the elements ``column .. column + 4`` of as many rows as
    they have lanes.
    """
    count = a.count
    if a.dtype != array.dtype:
        raise TypeError(f"vectors of {a.dtype} do not go into an array of {array.dtype}")

    def codegen(context, builder, sig, args):
        first_offset = builder.bitcast(
            _element_pointer(context, builder, offsets, args[1], args[2], count), ir.IntType(64).as_pointer()
        )
        index = ir.VectorType(ir.IntType(32), 4)
        # In group g, the four elements of row 4 g + j.
        rows = _transpose_fours(builder, *args[4:])
        for i in range(count):
            group = ir.Constant(index, list(range(i // 4 * 4, i // 4 * 4 + 4)))
            four = builder.shuffle_vector(rows[i % 4], ir.Constant(rows[0].type, ir.Undefined), group)
            at = builder.load(builder.gep(first_offset, [ir.Constant(ir.IntType(64), i)], inbounds=True))
            pointer = _element_pointer(context, builder, array, args[0], builder.add(at, args[3]), 4)
            builder.store(four, pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, offsets, types.int64, types.int64, a, b, c, d), codegen


@intrinsic
def load_one(typingctx, array, index, like):
    """One element of ``array`` as a scalar of ``like``'s type, converted as :func:`load` does."""
    vector = Vector(like, 1)

    def codegen(context, builder, sig, args):
        pointer = _element_pointer(context, builder, array, args[0], args[1], 1)
        value = builder.load(pointer, align=array.dtype.bitwidth // 8)
        value = _convert(builder, value, array.dtype, vector, _has_half_conversion(context))
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return like(array, types.int64, like), codegen


@intrinsic
def load_integer(typingctx, data, offset, like):
    """One integer of the type of ``like`` from the uint8 array ``data``, ``offset`` bytes in, aligned or not."""

    def codegen(context, builder, sig, args):
        pointer = _byte_pointer(context, builder, data, args[0], args[1], like.bitwidth // 8)
        return builder.load(builder.bitcast(pointer, ir.IntType(like.bitwidth).as_pointer()), align=1)

    return like(data, types.int64, like), codegen


@intrinsic
def load_integers(typingctx, data, offset, like):
    """A vector of int64 from as many integers of the type of ``like``, ``offset`` bytes into ``data``, not aligned."""
    vector = Vector.of(types.int64)

    def codegen(context, builder, sig, args):
        count = vector.count
        pointer = _byte_pointer(context, builder, data, args[0], args[1], count * like.bitwidth // 8)
        integers = ir.VectorType(ir.IntType(like.bitwidth), count)
        value = builder.load(builder.bitcast(pointer, integers.as_pointer()), align=1)
        if like.bitwidth == 64:
            return value
        return (builder.sext if like.signed else builder.zext)(value, _vector_ir(vector))

    return vector(data, types.int64, like), codegen


def _load_kind(context, builder, data_type, data, offset, kind, count):
    """``count`` integers of the type that ``kind`` tells, as int64 lanes: the logarithm of its bytes, plus 4 if it is
    unsigned. One function for all, because a copy of what is done with them per type takes long to compile.
    """
    lanes_ = ir.VectorType(ir.IntType(64), count)
    end = builder.append_basic_block("loaded")
    cases = [builder.append_basic_block(f"bytes{1 << k}") for k in range(4)]
    switch = builder.switch(builder.and_(kind, ir.Constant(kind.type, 3)), cases[3])
    values = []
    for k, block in enumerate(cases):
        builder.position_at_end(block)
        if k < 3:
            switch.add_case(ir.Constant(kind.type, k), block)
        pointer = _byte_pointer(context, builder, data_type, data, offset, count << k)
        integers = ir.VectorType(ir.IntType(8 << k), count)
        value = builder.load(builder.bitcast(pointer, integers.as_pointer()), align=1)
        if k < 3:
            unsigned = builder.icmp_signed(">=", kind, ir.Constant(kind.type, 4))
            value = builder.select(unsigned, builder.zext(value, lanes_), builder.sext(value, lanes_))
        values.append((value, builder.block))
        builder.branch(end)
    builder.position_at_end(end)
    result = builder.phi(lanes_)
    for value, block in values:
        result.add_incoming(value, block)
    return result


@intrinsic
def load_target(typingctx, data, offset, kind):
    """The integer ``offset`` bytes into ``data``, whose type ``kind`` tells as in :func:`load_targets`, as int64."""

    def codegen(context, builder, sig, args):
        value = _load_kind(context, builder, data, *args, 1)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.int64(data, types.int64, types.int64), codegen


@intrinsic
def load_targets(typingctx, data, offset, kind):
    """A vector of int64 from as many integers, ``offset`` bytes into ``data``, of the type that the int64 ``kind``
    tells: the logarithm of its bytes, plus 4 if it is unsigned. (uint64 is read as int64.)
    """
    vector = Vector.of(types.int64)

    def codegen(context, builder, sig, args):
        return _load_kind(context, builder, data, *args, vector.count)

    return vector(data, types.int64, types.int64), codegen


@intrinsic
def lane_steps(typingctx, step):
    """The int64 vector 0, step, 2 step, ..."""
    vector = Vector.of(types.int64)

    def codegen(context, builder, sig, args):
        return builder.mul(_constant(vector, range(vector.count)), _splat_ir(builder, vector, args[0]))

    return vector(types.int64), codegen


@intrinsic
def integer_like(typingctx, value, like):
    """The low bits of an int64 as an integer as wide as the float ``like``."""
    integer = Vector.of(like).integer.dtype

    def codegen(context, builder, sig, args):
        return builder.trunc(args[0], _scalar_ir(integer)) if integer.bitwidth < 64 else args[0]

    return integer(types.int64, like), codegen


@intrinsic
def store(typingctx, array, index, value):
    """Write a vector to the 1-D contiguous ``array`` from ``index`` on, as its float type, or int64 as int32."""
    both_float = isinstance(array.dtype, types.Float) and value.is_float
    narrows = (value.dtype, array.dtype) == (types.int64, types.int32)
    if array.dtype != value.dtype and not both_float and not narrows:
        raise TypeError(f"a vector of {value.dtype} does not go into an array of {array.dtype}")

    def codegen(context, builder, sig, args):
        pointer = _element_pointer(context, builder, array, args[0], args[1], value.count)
        stored = args[2]
        if narrows:
            stored = builder.trunc(stored, ir.VectorType(ir.IntType(32), value.count))
        elif array.dtype != value.dtype:
            convert = builder.fptrunc if array.dtype == types.float32 else builder.fpext
            stored = convert(stored, ir.VectorType(_scalar_ir(array.dtype), value.count))
        builder.store(stored, pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, value), codegen


@intrinsic
def store_streaming(typingctx, array, index, value):
    """:func:`store` past the caches, for what is not read again soon; the address is on the border of a vector."""
    if array.dtype != value.dtype:
        raise TypeError(f"a vector of {value.dtype} does not go into an array of {array.dtype}")

    def codegen(context, builder, sig, args):
        pointer = _element_pointer(context, builder, array, args[0], args[1], value.count)
        instruction = builder.store(args[2], pointer, align=VECTOR_BYTES)
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(array, types.int64, value), codegen


@intrinsic
def to_border(typingctx, array, index):
    """How many elements it is from an element to the next border of a vector (0 on one)."""

    def codegen(context, builder, sig, args):
        pointer = builder.gep(data_and_length(context, builder, array, args[0])[0], [args[1]])
        i64 = ir.IntType(64)
        n_bytes = builder.and_(builder.neg(builder.ptrtoint(pointer, i64)), i64(VECTOR_BYTES - 1))
        return builder.udiv(n_bytes, i64(array.dtype.bitwidth // 8))

    return types.int64(array, types.int64), codegen


@intrinsic
def fence(typingctx):
    """Have what was stored, past the caches too, seen by other threads before what follows."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _fma_ir(builder, vector, a, b, c):
    kind = _vector_ir(vector)
    name = f"llvm.fma.v{vector.count}f{vector.dtype.bitwidth}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(function, [a, b, c])


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c`` rounded once, on every CPU."""

    def codegen(context, builder, sig, args):
        return _fma_ir(builder, a, *args)

    return a(a, b, c), codegen


def polynomial_by_pairs(*coefficients):
    """Make the function ``(x, x**2) -> c0 + c1 x + c2 x**2 + ...``, by Horner's rule in x**2 for pairs of coefficients:
    one fused operation per degree too, but half as many that wait for one another.
    """

    @intrinsic
    def evaluate(typingctx, x, square):
        def codegen(context, builder, sig, args):
            constants = [_constant(x, [float(c)] * x.count) for c in coefficients]
            even, odd = constants[::2], constants[1::2]
            pairs = [_fma_ir(builder, x, b, args[0], a) for a, b in zip(even, odd, strict=False)]
            result, *others = reversed([*pairs, *even[len(odd) :]])
            for pair in others:
                result = _fma_ir(builder, x, result, args[1], pair)
            return result

        return x(x, x), codegen

    return evaluate


def polynomial(*coefficients):
    """Make the function ``x -> c0 + c1 x + c2 x**2 + ...``, by Horner's rule with one fused operation per degree."""

    @intrinsic
    def evaluate(typingctx, x):
        def codegen(context, builder, sig, args):
            result = _constant(x, [float(coefficients[-1])] * x.count)
            for c in reversed(coefficients[:-1]):
                result = _fma_ir(builder, x, result, args[0], _constant(x, [float(c)] * x.count))
            return result

        return x(x), codegen

    return evaluate


@intrinsic
def where(typingctx, mask, a, b):
    """Lane by lane ``a`` where the mask holds, else ``b``."""

    def codegen(context, builder, sig, args):
        return builder.select(*args)

    return a(mask, a, b), codegen


@intrinsic
def widen(typingctx, value):
    """The low and the high half of a float32 vector as float64 vectors."""
    vector = Vector.of(types.float64)

    def codegen(context, builder, sig, args):
        halves = _halves(builder, args[0], value.count)
        return cgutils.pack_array(builder, [builder.fpext(half, _vector_ir(vector)) for half in halves])

    return types.UniTuple(vector, 2)(value), codegen


@intrinsic
def to_bits(typingctx, value):
    """The bits of a float vector as an integer vector."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], _vector_ir(value.integer))

    return value.integer(value), codegen


@intrinsic
def from_bits(typingctx, bits):
    """The float vector with these bits."""
    vector = Vector(types.float32 if bits.dtype == types.int32 else types.float64, bits.count)

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], _vector_ir(vector))

    return vector(bits), codegen


@intrinsic
def to_float(typingctx, value):
    """An integer vector as floats of the same width."""
    vector = Vector(types.float32 if value.dtype == types.int32 else types.float64, value.count)

    def codegen(context, builder, sig, args):
        return builder.sitofp(args[0], _vector_ir(vector))

    return vector(value), codegen


def _tree(name, combine):
    """Make a reduction that folds the upper half onto the lower until one lane is left."""

    @intrinsic
    def reduce(typingctx, value):
        def codegen(context, builder, sig, args):
            result, count = args[0], value.count
            while count > 1:
                result = combine(builder, value, *_halves(builder, result, count))
                count //= 2
            return builder.extract_element(result, ir.Constant(ir.IntType(32), 0))

        return value.dtype(value), codegen

    reduce.__doc__ = f"The {name} of the lanes, by folding the upper half onto the lower until one lane is left."
    return reduce


def _add(builder, vector, a, b):
    return builder.fadd(a, b) if vector.is_float else builder.add(a, b)


def _larger(builder, vector, a, b):
    compare = builder.fcmp_ordered if vector.is_float else builder.icmp_signed
    return builder.select(compare(">", a, b), a, b)


tree_sum = _tree("sum", _add)
tree_max = _tree("maximum", _larger)


@intrinsic
def first_lane(typingctx, value):
    """Lane 0 as a scalar."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], ir.Constant(ir.IntType(32), 0))

    return value.dtype(value), codegen


@intrinsic
def mask_bits(typingctx, mask):
    """The lanes in which the mask holds as the bits of an int64."""

    def codegen(context, builder, sig, args):
        return builder.zext(builder.bitcast(args[0], ir.IntType(mask.count)), ir.IntType(64))

    return types.int64(mask), codegen


@intrinsic
def lowest_bit(typingctx, bits):
    """The place of the lowest bit that is set in an int64 other than 0."""

    def codegen(context, builder, sig, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


@intrinsic
def any_lane(typingctx, mask):
    """Whether the mask holds in some lane."""

    def codegen(context, builder, sig, args):
        bits = builder.bitcast(args[0], ir.IntType(mask.count))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(mask), codegen


@intrinsic
def next_task(typingctx, counter):
    """Take the next number from a shared one-element int64 counter (an atomic add: each number is taken once)."""

    def codegen(context, builder, sig, args):
        data, _ = data_and_length(context, builder, counter, args[0])
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


if config.DISABLE_JIT:
    from fastloss._kernels._simd_python import *  # noqa: F403
