"""How the code of a kernel is compiled: by Numba, but for what does nothing for these kernels.

A kernel calls about a hundred helpers, each specialised for its argument types, and Numba takes each through some
thirty passes, type resolution from scratch, LLVM's optimiser, machine code and wrappers for Python, before the caller,
into which LLVM has inlined it, goes the same way. Here

* a helper (:class:`Helper`) goes through the passes that its language needs and ends as LLVM code, which is optimised
  and compiled once, with the kernel's (:class:`_HelperLibrary`, :class:`_KernelLibrary`);
* so do the parts that Numba makes of a parallel kernel (:class:`_PartLibrary`);
* what a call was resolved to, and how an operation is lowered, is found once (:class:`_Typing`, :class:`_Target`);
* Python's garbage collector, which would look through all of Numba again and again, rests.

Only what this package compiles goes this way: Numba's state is shared, not changed.
"""

import collections
import functools
import gc
import inspect
import itertools
import operator
import os
from collections.abc import Callable
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir as llvm_ir
from llvmlite.ir.instructions import InsertValue
from numba.core import cgutils, config, ir, types
from numba.core.analysis import dead_branch_prune
from numba.core.bytecode import ByteCode, FunctionIdentity
from numba.core.callconv import RETCODE_NONE, RETCODE_OK
from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
from numba.core.compiler import Compiler, Flags, _make_subtarget
from numba.core.compiler_machinery import register_pass
from numba.core.cpu import CPUContext
from numba.core.datamodel import register_default as register_model
from numba.core.datamodel.models import OpaqueModel
from numba.core.funcdesc import PythonFunctionDescriptor
from numba.core.imputils import lower_builtin, user_function
from numba.core.interpreter import Interpreter
from numba.core.ir_utils import build_definitions
from numba.core.lowering import Lower
from numba.core.postproc import PostProcessor
from numba.core.registry import cpu_target
from numba.core.rewrites.static_getitem import RewriteConstGetitems
from numba.core.ssa import reconstruct_ssa
from numba.core.targetconfig import ConfigStack
from numba.core.typed_passes import (
    NativeLowering,
    NativeParforLowering,
    PreLowerStripPhis,
    type_inference_stage,
)
from numba.core.typing import Context, signature

__all__ = ["ByDtype", "Helper", "KernelCompiler", "field", "undisturbed"]

# Numba tells functions of one name and signature, as the closures of the kernels are, apart by a number that counts the
# functions of the process, and the linker resolves a name to the first function loaded under it. So where two kernels
# are loaded that two processes have compiled and kept, one could call a function of the other's. A random beginning
# keeps the numbers of all processes apart.
FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(7), "little"))


# ------------------------------------------------------------------------------------------------ resolving types

# Operators whose result depends on the types of the operands alone, never on the values of constants.
_OPERATORS = frozenset(
    {
        operator.add,
        operator.and_,
        operator.eq,
        operator.floordiv,
        operator.ge,
        operator.gt,
        operator.iadd,
        operator.iand,
        operator.ifloordiv,
        operator.ilshift,
        operator.imod,
        operator.imul,
        operator.ior,
        operator.irshift,
        operator.isub,
        operator.ixor,
        operator.le,
        operator.lshift,
        operator.lt,
        operator.mod,
        operator.mul,
        operator.ne,
        operator.neg,
        operator.or_,
        operator.rshift,
        operator.sub,
        operator.truediv,
        operator.xor,
    }
)


def _without_value(type_):
    """An integer constant's type as any integer's: Numba would specialise a helper for each constant."""
    return type_.literal_type if isinstance(type_, types.IntegerLiteral) else type_


# What calls were resolved to, by function and argument types.
_signatures = {}


class _Typing(Context):
    """Numba's typing context, with a memory for the signatures of calls.

    Numba tries, for every call and operator, all implementations that anybody has registered for it.
    """

    def __init__(self, context):
        self.__dict__ = context.__dict__

    def refresh(self):
        """Nothing: whoever compiles a kernel has done that."""

    def resolve_value_type(self, value):
        if value is min or value is max:
            return _Extremum(value, super().resolve_value_type(value))
        return super().resolve_value_type(value)

    def resolve_function_type(self, func, args, kws):
        if kws or not (func in _OPERATORS or isinstance(func, types.Function)):
            return super().resolve_function_type(func, args, kws)
        if not isinstance(func, types.Function):
            args = tuple(_without_value(a) for a in args)
        key = func, tuple(args)
        found = _signatures.get(key)
        if found is None:
            found = super().resolve_function_type(func, args, kws)
            if found is not None:
                _signatures[key] = found
        return found


class ByDtype(types.Callable, types.Dummy):
    """The type of a pair of helpers, of which the dtype of the first argument chooses one."""

    def __init__(self, narrow, wide):
        self._narrow, self._wide = narrow, wide
        super().__init__(f"ByDtype({narrow}, {wide})")

    @property
    def key(self):
        return self._narrow, self._wide

    def _chosen(self, args):
        return self._narrow if args[0].dtype == types.float32 else self._wide

    def get_call_type(self, context, args, kws):
        return self._chosen(args).get_call_type(context, args, kws)

    def get_call_signatures(self):
        return [], False

    def get_impl_key(self, sig):
        return self._chosen(sig.args).get_impl_key(sig)


class _Extremum(types.Callable, types.Dummy):
    """The type of ``min`` or ``max``: of int64 without the functions over tuples that Numba would compile."""

    def __init__(self, function, numbas):
        self._function, self._numbas = function, numbas
        super().__init__(f"_Extremum({function.__name__})")

    def get_call_type(self, context, args, kws):
        if kws or any(_without_value(a) != types.int64 for a in args):
            return self._numbas.get_call_type(context, args, kws)
        return signature(types.int64, *[types.int64] * len(args))

    def get_call_signatures(self):
        return self._numbas.get_call_signatures()

    def get_impl_key(self, sig):
        if any(a != types.int64 for a in sig.args):
            return self._numbas.get_impl_key(sig)
        return _smallest if self._function is min else _largest


def _smallest(builder, a, b):
    return builder.select(builder.icmp_signed("<", b, a), b, a)


def _largest(builder, a, b):
    return builder.select(builder.icmp_signed(">", b, a), b, a)


def _lower_extremum(choose):
    @lower_builtin(choose, types.VarArg(types.Integer))
    def lower(context, builder, sig, args):
        return functools.reduce(functools.partial(choose, builder), args)


_lower_extremum(_smallest)
_lower_extremum(_largest)


def field(builder, value, index):
    """A field of a struct: what was put there, if that is seen, else an instruction that extracts it."""
    whole = value
    while isinstance(whole, InsertValue):
        if list(whole.indices) == [index]:
            return whole.operands[1]
        whole = whole.operands[0]
    return builder.extract_value(value, index)


def _struct(context, builder, type_, *fields):
    value = llvm_ir.Constant(context.get_value_type(type_), llvm_ir.Undefined)
    for index, content in enumerate(fields):
        value = builder.insert_value(value, content, index)
    return value


def _slot(builder, kind, name=""):
    """Room for a variable, without Numba's zeros in it."""
    with builder.goto_entry_block():
        return builder.alloca(kind, name=name)


_WORD = llvm_ir.IntType(64)


def _range(context, builder, sig, args, loc):
    start, stop, step = (_WORD(0), args[0], _WORD(1)) if len(args) == 1 else (*args, _WORD(1))[:3]
    return _struct(context, builder, types.range_state64_type, start, stop, step)


def _range_iterator(context, builder, sig, args, loc):
    start, stop, step = (field(builder, args[0], index) for index in range(3))
    next_, unused = _slot(builder, _WORD), llvm_ir.Constant(_WORD.as_pointer(), llvm_ir.Undefined)
    builder.store(start, next_)
    return _struct(context, builder, types.range_iter64_type, next_, stop, step, unused)


def _range_next(context, builder, sig, args, loc):
    """As in C: Numba counts the iterations first, with a division, and raises where the step is 0."""
    next_, stop, step = (field(builder, args[0], index) for index in range(3))
    value = builder.load(next_)
    builder.store(builder.add(value, step, flags=["nsw"]), next_)
    is_valid = builder.select(
        builder.icmp_signed(">", step, _WORD(0)),
        builder.icmp_signed("<", value, stop),
        builder.icmp_signed(">", value, stop),
    )
    return _struct(context, builder, sig.return_type, value, is_valid)


def _divide(builder, a, b):
    """The quotient, rounded towards -inf, and the remainder of two int64, without branches; 0 and 0 for b = 0."""
    is_zero = builder.icmp_signed("==", b, _WORD(0))
    overflows = builder.and_(builder.icmp_signed("==", b, _WORD(-1)), builder.icmp_signed("==", a, _WORD(-(1 << 63))))
    divisor = builder.select(builder.or_(is_zero, overflows), _WORD(1), b)
    quotient, remainder = builder.sdiv(a, divisor), builder.srem(a, divisor)
    is_odd = builder.and_(
        builder.icmp_signed("!=", remainder, _WORD(0)),
        builder.icmp_signed("<", builder.xor(remainder, divisor), _WORD(0)),
    )
    quotient = builder.sub(quotient, builder.zext(is_odd, _WORD))
    remainder = builder.add(remainder, builder.select(is_odd, divisor, _WORD(0)))
    return builder.select(is_zero, _WORD(0), quotient), builder.select(is_zero, _WORD(0), remainder)


def _floordiv(context, builder, sig, args, loc):
    return _divide(builder, *args)[0]


def _mod(context, builder, sig, args, loc):
    return _divide(builder, *args)[1]


# What is lowered to less code than Numba's, by function and argument types.
_OWN = {
    **{(range, (types.int64,) * n): _range for n in (1, 2, 3)},
    ("getiter", (types.range_state64_type,)): _range_iterator,
    ("iternext", (types.range_iter64_type,)): _range_next,
    **{(op, (types.int64, types.int64)): _floordiv for op in (operator.floordiv, operator.ifloordiv)},
    **{(op, (types.int64, types.int64)): _mod for op in (operator.mod, operator.imod)},
}


# ------------------------------------------------------------------------------------------------------- lowering


class _Bound:
    """An implementation of an operation, with its libraries and signature, for a context."""

    def __init__(self, context, *parts):
        self._context, self.parts = context, parts

    def __call__(self, builder, args, loc=None):
        implementation, libraries, sig = self.parts
        result = implementation(self._context, builder, sig, args, loc=loc)
        self._context.add_linking_libs(libraries)
        return result


# What operations are lowered by, by function and signature.
_implementations = {}


class _Target(CPUContext):
    """Numba's target context, which looks for new implementations where a function's is missing, and nowhere else, and
    remembers which it has found.
    """

    def __init__(self, context, typing):
        self.__dict__.update(context.__dict__)
        self.typing_context = typing

    def refresh(self):
        for registry in tuple(self._registries):
            self.install_registry(registry)

    def get_function(self, fn, sig, _firstcall=True):
        key = fn, sig
        own = _OWN.get((getattr(fn, "typing_key", fn), sig.args))
        if own is not None:
            return _Bound(self, own, (), sig)
        if key not in _implementations:
            found = super().get_function(fn, sig, _firstcall)
            is_bound = isinstance(found, _Bound)  # by a call of this function
            _implementations[key] = found.parts if is_bound else (found._imp, getattr(found, "libs", ()), found._sig)
        return _Bound(self, *_implementations[key])


class _HelperLower(Lower):
    """Lower a helper for the module that it is linked into."""

    def setup_function(self, fndesc):
        super().setup_function(fndesc)
        self.function.linkage = "linkonce_odr"
        if not fndesc.inline:  # LLVM would inline one that is called once, and take longer
            self.function.attributes.add("noinline")

    def alloca_lltype(self, name, lltype, datamodel=None):
        # (Numba asks LLVM for the size of each variable, for debuggers.)
        if self.context.enable_nrt:  # what a variable held before, nothing at first, is released
            return cgutils.alloca_once(self.builder, lltype, name=name, zfill=False)
        return _slot(self.builder, lltype, name)

    def _find_singly_assigned_variable(self):
        """All variables that are assigned once are values, in other blocks too: the code is in SSA form, so that every
        way to where they are used leads through the assignment. (Numba makes room in memory, for LLVM to remove.)
        """
        if self.context.enable_nrt:
            super()._find_singly_assigned_variable()
            return
        blocks = self.blocks.values()
        counts = collections.Counter(inst.target.name for block in blocks for inst in block.find_insts(ir.Assign))
        self._singly_assigned_vars = {name for name, count in counts.items() if count == 1}
        self._blk_local_varmap = {}

    def pre_block(self, block):
        if self.context.enable_nrt:
            super().pre_block(block)
        else:  # no variables to be initialised
            self._cur_ir_block = block

    def storevar(self, value, name, argidx=None):
        if self.context.enable_nrt or name in self._singly_assigned_vars:
            super().storevar(value, name, argidx)
        else:  # without a load of the old value
            self._alloca_var(name, self.typeof(name))
            self.builder.store(value, self.getvar(name))

    def lower_expr(self, resty, expr):
        if expr.op in ("pair_first", "pair_second"):
            return field(self.builder, self.loadvar(expr.value.name), expr.op == "pair_second")
        return super().lower_expr(resty, expr)

    def lower_binop(self, resty, expr, op):
        # (Numba first looks for implementations for constants, of which there are some for powers.)
        args = self.fndesc.calltypes[expr].args
        sig = self.context.typing_context.resolve_function_type(op, args, {})
        operands = [self._cast_var(var, type_) for var, type_ in zip((expr.lhs, expr.rhs), sig.args, strict=True)]
        result = self.context.get_function(self.context.typing_context.resolve_value_type(op), sig)(
            self.builder, operands
        )
        return self.context.cast(self.builder, result, sig.return_type, resty)


class _HelperLibrary(JITCodeLibrary):
    """The LLVM code of a helper, for its callers to link: neither optimised nor compiled."""

    def add_ir_module(self, ir_module):
        self._final_module = llvm.parse_assembly(cgutils.normalize_ir_text(str(ir_module)))

    def finalize(self):
        self._raise_if_finalized()
        self._finalized = True

    def _get_module_for_linking(self):
        """For a function that is no kernel: with all that the helper calls."""
        module = self._final_module.clone()
        _link(module, self._linking_libraries)
        return module


class _PartLibrary(_HelperLibrary):
    """The LLVM code of a part of a kernel that Numba makes for its threads: the body of the loop, and two functions
    around it.

    Numba optimises and compiles each with all that it calls, and then the kernel with all of them: the same code four
    times over (cross-entropy of contiguous classes takes 4.8 seconds, 1.8 as it is here).
    """

    def add_ir_module(self, ir_module):
        self._final_module.link_in(llvm.parse_assembly(cgutils.normalize_ir_text(str(ir_module))))


def _link(module, libraries):
    """Link some libraries into a module, and what they call in turn, each once, callers first; all of them."""
    found, left = {}, list(libraries)
    while left:
        library = left.pop(0)
        if library in found:
            continue
        found[library] = None
        if isinstance(library, _HelperLibrary):
            left += library._linking_libraries
            part = library._final_module
        else:
            part = library._get_module_for_linking()
        module.link_in(part, preserve=True)
    return found


class _KernelLibrary(JITCodeLibrary):
    """The code of a kernel with that of its helpers, each linked once."""

    def _optimize_functions(self, ll_module):
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self):
        """Once: Numba's quick pass before is for reference counts, of which a kernel has next to none."""
        options = {"opt": min(config.OPT, 2), "slp_vectorize": False}
        manager = self._codegen._module_pass_manager(**options)
        if isinstance(manager, tuple):
            manager[0].run(self._final_module, manager[1])
        else:  # before Numba 0.62
            manager.run(self._final_module)

    def finalize(self):
        for library in _link(self._final_module, self._linking_libraries):
            if hasattr(library, "_reload_init"):  # (Numba 0.61 has none.)
                self._reload_init.update(library._reload_init)
            if isinstance(library, _PartLibrary):
                for function in library.get_defined_functions():  # of which what is not called can go
                    self._final_module.get_function(function.name).linkage = "linkonce_odr"
        self._linking_libraries = []
        super().finalize()


# ------------------------------------------------------------------------------------------------------- helpers


@functools.cache
def _contexts():
    typing = _Typing(cpu_target.typing_context)
    return typing, _Target(cpu_target.target_context, typing)


class _Flags(Flags):
    """Flags that are compared by identity."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def _mangled(name, args, *, abi_tags, uid):
    """A short name, of which there is one for each identity of a function."""
    return f"{name}.{uid}"


def _can_fail(function):
    """Whether an LLVM function returns anything but that all is well."""
    codes = {RETCODE_OK.constant, RETCODE_NONE.constant}
    for block in function.blocks:
        if block.terminator.opname == "ret" and getattr(block.terminator.operands[0], "constant", None) not in codes:
            return True
    return False


def _call(fndesc, library):
    """What lowers calls of a helper that cannot fail."""

    def lower(context, builder, sig, args):
        function = context.declare_function(builder.module, fndesc)
        result = _slot(builder, function.args[0].type.pointee)
        no_exception = llvm_ir.Constant(function.args[1].type, None)
        arguments = context.get_arg_packer(fndesc.argtypes).as_arguments(builder, args)
        builder.call(function, [result, no_exception, *arguments])
        return context.get_returned_value(builder, fndesc.restype, builder.load(result))

    lower.libs = (library,)
    return lower


class Helper(types.Callable, types.Dummy):
    """The type of a function that compiled code calls, and what compiles it, once for each types of its arguments."""

    def __init__(self, function, **options):
        self._function, self._options = function, options
        self._compiled = {}
        super().__init__(f"Helper({function.__qualname__} {id(function)})")

    def get_call_type(self, context, args, kws):
        if kws:
            args = inspect.signature(self._function).bind(*args, **kws).args
        args = tuple(_without_value(a) for a in args)
        if args not in self._compiled:
            self._compiled[args] = self._compile(args)
        return self._compiled[args]

    def get_call_signatures(self):
        return list(self._compiled.values()), False

    def get_impl_key(self, sig):
        return self, sig.args

    @functools.cached_property
    def _flags(self):
        """(Flags that are compared by identity: Numba compares them in every search for an implementation.)"""
        flags = Flags()
        cpu_target.options.parse_as_flags(flags, self._options)
        return _Flags(flags)

    def _front_end(self, args):
        """The function in Numba's terms, without what has no use here: no array expressions, closures, ``with``, or
        exceptions in a helper.
        """
        identity = FunctionIdentity.from_function(self._function)
        code = Interpreter(identity).interpret(ByteCode(identity))
        if len(args) != code.arg_count:
            raise TypeError(f"{self._function.__qualname__}: {len(args)} arguments, expected {code.arg_count}")
        dead_branch_prune(code, args)
        rewrite = RewriteConstGetitems(None)
        for label, block in code.blocks.items():
            if rewrite.match(code, block, None, None):
                code.blocks[label] = rewrite.apply()
        code = reconstruct_ssa(code)
        code._definitions = build_definitions(code.blocks)
        dead_branch_prune(code, args)
        return code

    def _compile(self, args):
        typing, target = _contexts()
        flags = self._flags
        target = _make_subtarget(target, flags)
        with ConfigStack().enter(flags):
            code = self._front_end(args)
            found = type_inference_stage(typing, target, code, args, None, {})
            code = PreLowerStripPhis()._strip_phi_nodes(code)
            if flags.nrt:  # where reference counts go down
                PostProcessor(code).run(emit_dels=True)
            library = _HelperLibrary(target.codegen(), code.func_id.func_qualname)
            fndesc = PythonFunctionDescriptor.from_specialized_function(
                code,
                found.typemap,
                found.return_type,
                found.calltypes,
                mangler=_mangled,
                inline=flags.forceinline,
                noalias=flags.noalias,
                abi_tags=(),
            )
            with target.push_code_library(library):
                lower = _HelperLower(target, library, fndesc, code, {})
                lower.lower()
        fndesc.typemap = fndesc.calltypes = None
        sig = signature(found.return_type, *args)
        call = user_function(fndesc, [library]) if _can_fail(lower.function) else _call(fndesc, library)
        target.insert_func_defn([(call, self.get_impl_key(sig), args)])
        return sig


register_model(ByDtype)(OpaqueModel)
register_model(_Extremum)(OpaqueModel)
register_model(Helper)(OpaqueModel)


# ------------------------------------------------------------------------------------------------------- kernels


class _PartCodegen(JITCPUCodegen):
    """Numba's code generator, whose libraries are parts of a kernel."""

    _library_class = _PartLibrary

    def __init__(self, codegen):
        self.__dict__ = codegen.__dict__


class _PartTarget(CPUContext):
    """A target context for the parts of a kernel, which are not to be called but by the kernel."""

    def __init__(self, context):
        self.__dict__.update(context.__dict__)
        self._internal_codegen = _PartCodegen(context.codegen())
        self.cached_internal_func = {}

    def get_executable(self, library, fndesc, env):
        return object() if isinstance(library, _PartLibrary) else super().get_executable(library, fndesc, env)


class _IntoKernelLibrary:
    def run_pass(self, state):
        context = state.targetctx
        state.library = _KernelLibrary(context.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        state.targetctx = _PartTarget(context)
        try:
            return super().run_pass(state)
        finally:
            state.targetctx = context


@register_pass(mutates_CFG=True, analysis_only=False)
class _KernelLowering(_IntoKernelLibrary, NativeLowering):
    _name = "fastloss_kernel_lowering"


@register_pass(mutates_CFG=True, analysis_only=False)
class _ParallelKernelLowering(_IntoKernelLibrary, NativeParforLowering):
    _name = "fastloss_parallel_kernel_lowering"


def _with_room(function, *args):
    return function(*args)


# CPython keeps the frames of calls in pieces of 16 KiB, each mapped when a call needs it, unmapped when that returns.
# A loop at a depth where a piece ends does so in every turn: 57,000 times in a compilation, which is half a second. For
# a frame that is larger than a piece there is one of a power of two, here a MiB, with room for all that is called.
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=1 << 16)


def undisturbed(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that makes some 100,000 objects, few of them garbage, while the garbage collector rests: it would
    search Numba's million with them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _with_room(function, *args)
    finally:
        if enabled:
            gc.enable()


class KernelCompiler(Compiler):
    """Numba's compiler, for a kernel."""

    def compile_extra(self, func):
        return undisturbed(super().compile_extra, func)

    def define_pipelines(self):
        (manager,) = super().define_pipelines()
        lowering = {NativeLowering: _KernelLowering, NativeParforLowering: _ParallelKernelLowering}
        manager.passes = [(lowering.get(pass_, pass_), description) for pass_, description in manager.passes]
        manager._finalized = False
        manager.finalize()
        return [manager]
