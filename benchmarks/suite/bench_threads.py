"""What more threads bring: cross-entropy in two regimes, on one thread and on two."""

import cases
import common


class Threads:
    tiny = False
    params = (["few classes", "ImageNet"], [1, 2])
    param_names = ("regime", "threads")
    timeout = 300

    def setup(self, regime, threads):
        common.use_threads(threads)
        self.call = cases.ready("cross_entropy, float32", regime, self.tiny)

    def time_call(self, regime, threads):
        self.call()
