"""Worst errors in units in the last place, on seeded rows whose losses are tiny, ordinary and huge."""

import accuracy
import common
import numpy as np


class Accuracy:
    tiny = False
    params = (["cross_entropy", "softmax", "log_softmax"], ["float32", "float64"], list(accuracy.BANDS))
    param_names = ("function", "dtype", "losses")
    timeout = 300
    n_rows, n_classes = 2000, 100

    def setup(self, function, dtype, losses):
        rng = np.random.default_rng([common.SEED, list(accuracy.BANDS).index(losses)])
        self.function = common.public(function)
        self.logits, self.labels = accuracy.rows(rng, 10 if self.tiny else self.n_rows, self.n_classes, losses, dtype)
        # without mpmath, which few machines have, the longdouble formulas are not checked against it once more
        exact = accuracy.exact_values(self.logits, self.labels, n_checked=0)
        self.exact = exact["loss" if function == "cross_entropy" else function]

    def track_worst_error(self, function, dtype, losses):
        if function == "cross_entropy":
            got = self.function(self.logits, self.labels, reduction="none")
        else:
            got = self.function(self.logits)
        seen = np.abs(self.exact) >= np.finfo(dtype).tiny  # below, there are no units in the last place to count
        return float(accuracy.ulp_errors(got[seen], self.exact[seen], dtype).max())

    track_worst_error.unit = "ulp"
