"""Memory: nothing of the size of the input is allocated."""

import functools
import sys

import cases
import common
import memory

SHAPES = {"rows": (25_000, 1000), "segmentation": (4, 21, 512, 576)}
SMALLER = {"rows": (600, 1000), "segmentation": (1, 21, 64, 64)}  # still large enough to run in parallel


def _call(function, inputs):
    public = common.public(function)
    if function == "cross_entropy":
        return functools.partial(public, inputs.logits, inputs.labels)
    return functools.partial(public, inputs.logits, axis=1)


class _Memory:
    """Kernels are compiled, and threads started, before the input of some 100 MB is made."""

    tiny = False
    params = (["cross_entropy", "softmax"], ["rows", "segmentation"])
    param_names = ("function", "layout")
    timeout = 300

    def setup(self, function, layout):
        smaller = common.Inputs(cases.tiny_shape(SMALLER[layout]) if self.tiny else SMALLER[layout])
        _call(function, smaller)()
        self.inputs = smaller if self.tiny else common.Inputs(SHAPES[layout])
        self.call = _call(function, self.inputs)


class Peak(_Memory):
    """Of the whole process: the input, the interpreter and Numba are in it."""

    def peakmem_call(self, function, layout):
        self.call()


class BeyondTheInput(_Memory):
    """Of the call alone."""

    def setup(self, function, layout):
        if sys.platform != "linux":
            raise NotImplementedError("the peak is read from /proc")
        super().setup(function, layout)

    def track_peak(self, function, layout):
        return memory.peak_growth(self.call)[1]

    track_peak.unit = "MiB"
