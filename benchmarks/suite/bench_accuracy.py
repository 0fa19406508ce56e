"""Worst errors in units in the last place, on seeded rows whose losses are tiny, ordinary and huge."""

import accuracy
import common
import numpy as np


class Accuracy:
    tiny = False
    params = (["cross_entropy", "softmax", "log_softmax"], ["float32", "float64"])
    param_names = ("function", "dtype")
    n_rows, n_classes = 2000, 100

    def setup(self, function, dtype):
        self.function = common.public(function)
        self.rows = []
        for k, band in enumerate(accuracy.BANDS):
            rng = np.random.default_rng([common.SEED, k])
            logits, labels = accuracy.rows(rng, 10 if self.tiny else self.n_rows, self.n_classes, band, dtype)
            # (`accuracy.py` checks the longdouble formulas against mpmath)
            exact = accuracy.exact_values(logits, labels, n_checked=0)
            self.rows.append((logits, labels, exact["loss" if function == "cross_entropy" else function]))

    def track_worst_error(self, function, dtype):
        worst = 0.0
        for logits, labels, exact in self.rows:
            is_loss = function == "cross_entropy"
            got = self.function(logits, labels, reduction="none") if is_loss else self.function(logits)
            seen = np.abs(exact) >= np.finfo(dtype).tiny  # below, there are no units in the last place to count
            worst = max(worst, float(accuracy.ulp_errors(got[seen], exact[seen], dtype).max()))
        return worst

    track_worst_error.unit = "ulp"
