"""What more threads bring: the losses of two regimes, on one thread and on two."""

import cases
import common


class Threads:
    tiny = False
    params = (["cross_entropy", "softmax"], ["few classes", "ImageNet"], [1, 2])
    param_names = ("case", "regime", "threads")
    timeout = 300

    def setup(self, case, regime, threads):
        common.use_threads(threads)
        self.call = cases.ready(case, regime, "float32", self.tiny)

    def time_call(self, case, regime, threads):
        self.call()
