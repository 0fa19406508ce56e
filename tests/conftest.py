"""Fixtures: seeded random numbers, arrays that must come back as they went in, every memory layout."""

import itertools
import signal
import zlib

import numpy as np
import pytest
from hypothesis import settings

# The same examples on every run; compiling a kernel takes seconds, so no deadline.
settings.register_profile("fastloss", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("fastloss")

# Tests interrupt processes, which inherit it where Ctrl-C is ignored: as it is in what a script starts with "&".
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole files to each worker of ``-n``: what one has compiled, another finds in the cache.

    In the order of their names: by number of tests, the longest, which are single ones, would come last.
    """
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


def _memory_of(array):
    """The array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@pytest.fixture
def frozen():
    """Make an array read-only, its owner included; when the test is over, its memory must be what it was."""
    held = []

    def freeze(array):
        owner = _memory_of(array)
        if isinstance(array, np.ndarray):
            owner.flags.writeable = False
            array.flags.writeable = False
        held.append((owner, owner.tobytes()))
        return array

    yield freeze
    for owner, before in held:
        assert owner.tobytes() == before, "an input was written to"


@pytest.fixture
def serial(monkeypatch):
    """No parallel kernels, each of which takes seconds to compile, where what is tested has nothing to do with them."""
    from fastloss import _runtime

    monkeypatch.setattr(_runtime, "PARALLEL_THRESHOLD", 1 << 60)


# --------------------------------------------------------------------------------------------------- layouts


def _with_axis_order(array, order):
    """The same array, its axes lying in memory in this order, outermost first."""
    return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))


def _class_axis_innermost(array):
    order = [a for a in range(array.ndim) if a != 1] + [1] * (array.ndim > 1)
    return _with_axis_order(array, order)


def _class_axis_outermost(array):
    order = [1] * (array.ndim > 1) + [a for a in range(array.ndim) if a != 1]
    return _with_axis_order(array, order)


def _sliced(array):
    """Every axis a slice with a step out of a larger one."""
    big = np.zeros([2 * n + 3 for n in array.shape], array.dtype)
    view = big[tuple(slice(1, 2 * n + 1, 2) for n in array.shape)]
    view[...] = array
    return view


def _cropped(array):
    """A window out of a larger array: unit stride within, gaps between."""
    big = np.zeros([n + 3 for n in array.shape], array.dtype)
    view = big[tuple(slice(1, n + 1) for n in array.shape)]
    view[...] = array
    return view


def _reversed(array):
    back = (slice(None, None, -1),) * array.ndim
    return np.ascontiguousarray(array[back])[back]


def _reversed_rows(array):
    return np.ascontiguousarray(array[::-1])[::-1]


def _odd_offset(array):
    """In a byte buffer, one byte behind an aligned address."""
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    view = buffer[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def _packed_field(array):
    """A field of packed records: the stride is no multiple of the item's size."""
    records = np.zeros(array.shape, np.dtype([("flag", np.uint8), ("value", array.dtype)]))
    records["value"] = array
    return records["value"]


def _byte_swapped(array):
    return array.astype(array.dtype.newbyteorder())


def _big_and_odd(array):
    return _packed_field(_byte_swapped(array))


LAYOUTS = {
    "c": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "class_axis_innermost": _class_axis_innermost,
    "class_axis_outermost": _class_axis_outermost,
    "sliced": _sliced,
    "cropped": _cropped,
    "reversed": _reversed,
    "reversed_rows": _reversed_rows,
    "odd_offset": _odd_offset,
    "packed_field": _packed_field,
    "byte_swapped": _byte_swapped,
    "byte_swapped_packed_field": _big_and_odd,
    "memory_map": None,
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path, frozen):
    """A function that returns an array of the same values, read-only, in one of the memory layouts."""
    counter = itertools.count()

    def lay_out(array):
        array = np.asarray(array)
        if request.param == "memory_map":
            path = tmp_path / f"{next(counter)}.bin"
            path.write_bytes(array.tobytes() or b"\0")
            return np.memmap(path, array.dtype, mode="r", shape=array.shape)
        if array.ndim == 0:
            return array
        return frozen(LAYOUTS[request.param](array.copy()))

    lay_out.name = request.param
    return lay_out
