"""How the code of a kernel is compiled: Numba's own stages, but for those that do nothing for these kernels.

A kernel calls about a hundred helpers, each specialised for its argument types, and Numba takes each through some
thirty passes, type resolution from scratch, LLVM's optimiser, machine code and wrappers for Python, before the caller,
into which LLVM has inlined it, goes the same way. Here

* a helper goes through the passes that its language needs (:data:`_PASSES`) and ends as LLVM code,
  which is optimised and compiled once, with the kernel's (:class:`_HelperLibrary`, :class:`_KernelLibrary`);
* the signature of a call that was resolved once is remembered (:class:`_Typing`);
* Python's garbage collector, which would look through all of Numba again and again, rests.

Only what this package compiles goes this way: Numba's state is shared, not changed.
"""

import contextlib
import functools
import gc
import itertools
import operator
import os

from llvmlite import binding as llvm
from numba.core import cgutils, config, types
from numba.core.bytecode import FunctionIdentity
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompilerBase, Flags
from numba.core.compiler_machinery import register_pass
from numba.core.cpu import CPUContext
from numba.core.datamodel import register_default as register_model
from numba.core.datamodel.models import OpaqueModel
from numba.core.lowering import Lower
from numba.core.postproc import PostProcessor
from numba.core.registry import cpu_target
from numba.core.targetconfig import ConfigStack
from numba.core.typed_passes import (
    NativeLowering,
    NativeParforLowering,
    NoPythonBackend,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.typing import Context
from numba.core.untyped_passes import (
    DeadBranchPrune,
    FixupArgs,
    GenericRewrites,
    IRProcessing,
    ReconstructSSA,
    TranslateByteCode,
)

__all__ = ["ByDtype", "HelperCompiler", "KernelCompiler"]

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

    def resolve_function_type(self, func, args, kws):
        if kws or not (func in _OPERATORS or isinstance(func, (types.Dispatcher, types.Function))):
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
        return types.Dispatcher(self._narrow if args[0].dtype == types.float32 else self._wide)

    def get_call_type(self, context, args, kws):
        return context.resolve_function_type(self._chosen(args), args, kws)

    def get_call_signatures(self):
        return [], False

    def get_impl_key(self, sig):
        return self._chosen(sig.args).get_impl_key(sig)


register_model(ByDtype)(OpaqueModel)


# ------------------------------------------------------------------------------------------------------- lowering


class _Target(CPUContext):
    """Numba's target context, which looks for new implementations where a function's is missing, and nowhere else."""

    def __init__(self, context, typing):
        self.__dict__.update(context.__dict__)
        self.typing_context = typing

    def refresh(self):
        for registry in tuple(self._registries):
            self.install_registry(registry)


@functools.cache
def _contexts():
    typing = _Typing(cpu_target.typing_context)
    return typing, _Target(cpu_target.target_context, typing)


class _HelperLower(Lower):
    """Lower a helper for the module that it is linked into."""

    def setup_function(self, fndesc):
        super().setup_function(fndesc)
        self.function.linkage = "linkonce_odr"
        if not fndesc.inline:  # LLVM would inline one that is called once, and take longer
            self.function.attributes.add("noinline")

    def alloca_lltype(self, name, lltype, datamodel=None):
        # (Numba asks LLVM for the size of each variable, for debuggers.)
        return cgutils.alloca_once(self.builder, lltype, name=name, zfill=False)


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
        self._linking_libraries = []
        super().finalize()


# -------------------------------------------------------------------------------------------------------- passes

_prune = DeadBranchPrune()
_prune.analysis = {DeadBranchPrune: set()}

# (No array expressions, closures, ``with``, or exceptions with values in a helper; nothing to annotate.)
_PASSES = (
    TranslateByteCode(),
    FixupArgs(),
    IRProcessing(),
    _prune,
    GenericRewrites(),
    ReconstructSSA(),
    _prune,
    NopythonTypeInference(),
    PreLowerStripPhis(),
)


class _Lowering(NativeLowering):
    @property
    def lowering_class(self):
        return _HelperLower


class _IntoKernelLibrary:
    def run_pass(self, state):
        state.library = _KernelLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return super().run_pass(state)


@register_pass(mutates_CFG=True, analysis_only=False)
class _KernelLowering(_IntoKernelLibrary, NativeLowering):
    _name = "fastloss_kernel_lowering"


@register_pass(mutates_CFG=True, analysis_only=False)
class _ParallelKernelLowering(_IntoKernelLibrary, NativeParforLowering):
    _name = "fastloss_parallel_kernel_lowering"


class _Flags(Flags):
    """Flags that are compared by identity."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


_flags = {}


class HelperCompiler(CompilerBase):
    """From a helper's Python code to LLVM's."""

    def __init__(self, typingctx, targetctx, *args):
        super().__init__(*_contexts(), *args)

    def define_pipelines(self):
        raise NotImplementedError

    def _compile_core(self):
        state = self.state
        state.flags.no_compile = True
        # One object for equal flags: Numba compares them in every search for an implementation.
        with ConfigStack().enter(_flags.setdefault(state.flags.copy(), _Flags(state.flags))):
            for pass_ in _PASSES:
                pass_.run_pass(state)
            if state.flags.nrt:  # where reference counts go down
                PostProcessor(state.func_ir).run(emit_dels=True)
            state.library = _HelperLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
            _Lowering().run_pass(state)
            # Numba's tables want a builtin function of its own for each; this one raises when Python calls it.
            stand_in = {}.popitem
            state.targetctx.insert_user_function(stand_in, state["cr"].fndesc, [state.library])
            state["cr"] = state["cr"]._replace(cfunc=stand_in)
            NoPythonBackend().run_pass(state)
        return state.cr


@contextlib.contextmanager
def _no_garbage_collection():
    """Some 10,000 objects a second are made, few of them garbage, and Numba's million would be searched with them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class KernelCompiler(Compiler):
    """Numba's compiler, for a kernel."""

    def compile_extra(self, func):
        with _no_garbage_collection():
            return super().compile_extra(func)

    def define_pipelines(self):
        (manager,) = super().define_pipelines()
        lowering = {NativeLowering: _KernelLowering, NativeParforLowering: _ParallelKernelLowering}
        manager.passes = [(lowering.get(pass_, pass_), description) for pass_, description in manager.passes]
        manager._finalized = False
        manager.finalize()
        return [manager]
