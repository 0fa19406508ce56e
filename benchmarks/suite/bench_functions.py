"""The time of every public function, per regime and dtype: the rows of `CASES` in `cases.py`."""

import cases


class _Regime:
    """Inputs are made, and kernels compiled, in `setup`. `tiny` is for the ordinary tests."""

    regime = ""
    tiny = False
    param_names = ("case",)
    timeout = 300  # a first call compiles

    def setup(self, case):
        self.call = cases.ready(case, self.regime, self.tiny)

    def time_call(self, case):
        self.call()


class FewClasses(_Regime):
    regime = "few classes"
    params = cases.grid(regime)


class ImageNet(_Regime):
    regime = "ImageNet"
    params = cases.grid(regime)


class Vocabulary(_Regime):
    regime = "vocabulary"
    params = cases.grid(regime)


class OneRow(_Regime):
    regime = "one row"
    params = cases.grid(regime)


class Segmentation(_Regime):
    regime = "segmentation"
    params = cases.grid(regime)


class Latency(_Regime):
    regime = "latency"
    params = cases.grid(regime)
