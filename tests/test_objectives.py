"""Custom objectives: the gradient and Hessian in closed form, and both libraries trained with them for real."""

import pickle

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import train_test_split

import fastloss
from fastloss.objectives import LightGBMCrossEntropy, XGBoostCrossEntropy

N_ROUNDS = 12
LIGHTGBM_OPTIONS = {"num_class": 10, "num_leaves": 7, "verbose": -1, "num_threads": 1, "seed": 0, "deterministic": True}
OBJECTIVES = [XGBoostCrossEntropy, LightGBMCrossEntropy]


def log_softmax(scores):
    scores = np.asarray(scores, np.float64)
    scores = scores - scores.max(1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def closed_form(scores, labels, weight, eps, ignore_index, sample_weight, factor):
    """Gradient, p (1 - p) times the row's mass times the factor, and the mean loss, in NumPy."""
    n_classes = scores.shape[1]
    kept = labels != ignore_index
    w = np.ones(n_classes) if weight is None else np.asarray(weight)
    one_hot = np.eye(n_classes)[np.where(kept, labels, 0)]
    masses = w * ((1 - eps) * one_hot + eps / n_classes) * (kept * sample_weight)[:, None]
    log_p = log_softmax(scores)
    p = np.exp(log_p)
    total = masses.sum(1, keepdims=True)
    loss = -(masses * log_p).sum() / (w[np.where(kept, labels, 0)] * kept * sample_weight).sum()
    return p * total - masses, factor * p * (1 - p) * total, loss


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weight", [None, [1.0, 0.5, 3.0, 2.0]], ids=["plain", "weighted"])
@pytest.mark.parametrize("eps", [0.0, 0.2])
class TestClosedForm:
    def problem(self, rng, dtype, order):
        scores = np.asarray(rng.normal(size=(50, 4)) * 2, dtype, order)
        labels = rng.integers(0, 4, 50)
        labels[::7] = 9
        return scores, labels, rng.random(50)

    @pytest.mark.parametrize("make", OBJECTIVES)
    def test_both_apis(self, rng, make, weight, eps, dtype, order):
        scores, labels, sample_weight = self.problem(rng, dtype, order)
        objective = make(weight, ignore_index=9, label_smoothing=eps)
        factor = 2 if make is XGBoostCrossEntropy else 4 / 3

        class Dataset:
            """What both libraries' data sets have; labels and weights are float32 there."""

            def get_label(self):
                return labels.astype(np.float32)

            def get_weight(self):
                return sample_weight

        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is np.float32 else {"rtol": 1e-11, "atol": 1e-13}
        for weights, got, value in (
            (np.ones(50), objective(labels, scores), objective.metric(labels, scores)),
            (sample_weight, objective(labels, scores, sample_weight), objective.metric(labels, scores, sample_weight)),
            (sample_weight, objective(scores, Dataset()), objective.metric(scores, Dataset())),
        ):
            gradient, hessian, loss = closed_form(scores, labels, weight, eps, 9, weights, factor)
            np.testing.assert_allclose(got[0], gradient, **tolerance)
            np.testing.assert_allclose(got[1], hessian, **tolerance)
            assert got[0].shape == got[1].shape == scores.shape
            assert got[0].flags.f_contiguous == got[1].flags.f_contiguous == (order == "F")
            assert (got[0][labels == 9] == 0).all()
            assert (got[1][labels == 9] == 0).all()
            value = value if isinstance(value, float) else value[1]
            np.testing.assert_allclose(value, loss, **tolerance)


def test_what_the_metrics_return():
    scores, labels = np.zeros((2, 3)), np.array([0, 1])
    assert XGBoostCrossEntropy().metric(labels, scores) == pytest.approx(np.log(3))
    assert XGBoostCrossEntropy().metric.__name__ == "cross_entropy"
    assert LightGBMCrossEntropy().metric(labels, scores) == ("cross_entropy", pytest.approx(np.log(3)), False)


@pytest.mark.parametrize("make", OBJECTIVES)
class TestInterface:
    def test_shown_compared_and_pickled_by_the_options(self, make):
        objective = make([1.0, 2.0], label_smoothing=0.5)
        assert repr(make()) == f"{make.__name__}(weight=None, ignore_index=-100, label_smoothing=0.0)"
        assert pickle.loads(pickle.dumps(objective)) == objective
        assert objective != make([1.0, 2.0])

    def test_errors(self, make):
        scores = np.zeros((2, 3))
        with pytest.raises(ValueError, match="label_smoothing"):
            make(label_smoothing=2)
        with pytest.raises(ValueError, match=r"labels: got 0\.5, expected whole numbers"):
            make()([0.5, 1.0], scores)
        with pytest.raises(ValueError, match="is num_class among the parameters"):
            make()([0, 1], np.zeros(2))
        with pytest.raises(ValueError, match="is num_class among the parameters"):
            make()([0, 1, 2], scores)
        with pytest.raises(ValueError, match=r"sample_weight: got shape \(3,\)"):
            make()([0, 1], scores, np.ones(3))
        with pytest.raises(ValueError, match="weight: got shape"):
            make([1.0, 2.0])([0, 1], scores)
        with pytest.raises(IndexError, match="target: got 3 at 1"):
            make().metric([0, 3], scores)
        with pytest.raises(IndexError, match="target: got 3 at 1"):
            make()([0, 3], scores)

    @pytest.mark.parametrize(
        ("labels", "error", "match"),
        [
            ([np.inf, 1], ValueError, "labels: got inf, expected whole numbers"),
            ([1, -np.inf], ValueError, "labels: got -inf, expected whole numbers"),
            ([1, np.nan], ValueError, "labels: got nan, expected whole numbers"),
            (np.float16([1, np.inf]), ValueError, "labels: got inf, expected whole numbers"),
            ([1e30, 1], ValueError, r"labels: got 1e\+30, expected whole numbers of int64"),
            ([-1e30, 1], ValueError, r"labels: got -1e\+30, expected whole numbers of int64"),
            (np.float32([1, 2**63]), ValueError, r"labels: got 9\.22\d*e\+18, expected whole numbers of int64"),
            ([-(2.0**63), 1], IndexError, "target: got -9223372036854775808 at 0"),
            (np.array([2**64 - 100, 1], np.uint64), IndexError, "target: got 18446744073709551516 at 0"),
            (np.array([1, 2**63], ">u8"), IndexError, "target: got 9223372036854775808 at 1"),
        ],
    )
    def test_labels_that_no_class_can_have(self, make, labels, error, match):
        """As int64 they would be other numbers, 2**64 - 100 the default of `ignore_index`."""
        scores = np.zeros((2, 3))
        for function in (make(), make().metric):
            with pytest.raises(error, match=match):
                function(labels, scores)

    def test_labels_of_every_integer_dtype(self, make):
        scores = np.log([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
        for dtype in "bBhHiIqQefd":
            gradient, _ = make()(np.array([0, 2, 1], dtype), scores)
            np.testing.assert_allclose(gradient, np.exp(scores) - np.eye(3)[[0, 2, 1]], rtol=1e-12, atol=1e-15)
        ignored = np.array([0, 2**64 - 1, 1], np.uint64)
        gradient, _ = make(ignore_index=2**64 - 1)(ignored, scores)
        assert gradient.any(axis=1).tolist() == [True, False, True]


class TestInitScore:
    def test_the_logarithms_of_the_shares(self):
        objective = LightGBMCrossEntropy(ignore_index=9)
        found = objective.init_score([0, 2, 9, 2, 1])
        np.testing.assert_allclose(found, np.log([0.25, 0.25, 0.5]), rtol=1e-14)
        found = objective.init_score(np.array([0, 2, 9, 2, 1], np.uint64), [1, 2, np.nan, 0, 5])
        np.testing.assert_allclose(found, np.log([1 / 8, 5 / 8, 2 / 8]), rtol=1e-14)
        np.testing.assert_allclose(objective.init_score([True, False, True]), np.log([1 / 3, 2 / 3]), rtol=1e-14)
        np.testing.assert_allclose(objective.init_score([0.0, 2.0])[[0, 2]], np.log([0.5, 0.5]), rtol=1e-14)

    @pytest.mark.parametrize(
        ("error", "match", "arguments"),
        [
            (ValueError, r"y_true: got shape \(1, 2\), expected \(n_samples,\)", ([[0, 1]],)),
            (ValueError, r"y_true: got shape \(\), expected", (1,)),
            (ValueError, "y_true: got -1, expected class indices", ([0, -1],)),
            (ValueError, r"y_true: got 0\.5, expected whole numbers", ([0, 0.5],)),
            (ValueError, "y_true: got inf, expected whole numbers", ([0, np.inf],)),
            (ValueError, "y_true: got 1000000000000, expected class indices", ([0, 10**12],)),
            (ValueError, "y_true: got 18446744073709551516, expected", (np.array([0, 2**64 - 100], np.uint64),)),
            (ValueError, "y_true: got 0 labels of which none counts", (np.zeros(0, int),)),
            (ValueError, "y_true: got 2 labels of which none counts", ([-100, -100],)),
            (TypeError, "y_true: got dtype <U1", (["0", "1"],)),
            (ValueError, r"sample_weight: got shape \(3,\), expected \(2,\)", ([0, 1], [1, 1, 1])),
            (TypeError, "sample_weight: got dtype <U1", ([0, 1], ["1", "2"])),
            (TypeError, "sample_weight: got dtype complex128", ([0, 1], [1j, 2])),
            (ValueError, "sample_weight: got -1.0, expected finite numbers", ([0, 1], [3, -1])),
            (ValueError, "sample_weight: got nan, expected finite numbers", ([0, 1], [3, np.nan])),
            (ValueError, "sample_weight: got inf, expected finite numbers", ([0, 1], [3, np.inf])),
            (ValueError, "sample_weight: got weights of sum 0.0", ([0, 1], [0, 0])),
            (ValueError, "sample_weight: got weights of sum inf", ([0, 1], [1e308, 1e308])),
        ],
    )
    def test_errors(self, error, match, arguments):
        with pytest.raises(error, match=match):
            LightGBMCrossEntropy().init_score(*arguments)


# ---------------------------------------------------------------------------------------------- trained for real


@pytest.fixture(scope="module")
def digits():
    """Train and validation data, with integers for features: every library has the same bins for them."""
    X, y = load_digits(return_X_y=True)
    return train_test_split(X[:900], y[:900], test_size=0.3, random_state=0)


@pytest.fixture(scope="module")
def xgboost():
    return pytest.importorskip("xgboost")


@pytest.fixture(scope="module")
def lightgbm():
    return pytest.importorskip("lightgbm")


def round_by_round(curves):
    """The validation losses of two trainings of one library agree, and they learned something."""
    ours, theirs = curves
    assert len(ours) == len(theirs) == N_ROUNDS
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert theirs[-1] < 0.75 * theirs[0]


def numpy_objective(weight, eps, factor):
    """An independent custom objective for both libraries: ``(preds, data)``."""

    def objective(preds, data):
        labels = data.get_label().astype(int)
        return closed_form(preds, labels, weight, eps, -100, np.ones(len(labels)), factor)[:2]

    return objective


class TestXGBoost:
    def train(self, xgboost, data, objective, metric=None, weight=None, valid_weight=None, **options):
        """Validation losses: of the custom metric, else of ``mlogloss``."""
        X, X_valid, y, y_valid = data
        params = {"num_class": 10, "max_depth": 3, "eta": 0.3, "base_score": 0.5, "nthread": 1, "seed": 0} | options
        if isinstance(objective, str):
            params |= {"objective": objective, "eval_metric": "mlogloss"}
        elif metric is not None:
            params["disable_default_eval_metric"] = 1
        valid = xgboost.DMatrix(X_valid, y_valid, weight=valid_weight)
        history = {}
        booster = xgboost.train(
            params,
            xgboost.DMatrix(X, y, weight=weight),
            N_ROUNDS,
            evals=[(valid, "valid")],
            obj=None if isinstance(objective, str) else objective,
            custom_metric=metric,
            evals_result=history,
            verbose_eval=False,
        )
        return history["valid"].get("cross_entropy") or history["valid"]["mlogloss"], booster, valid

    def test_without_options_it_is_their_softmax(self, xgboost, digits):
        objective = XGBoostCrossEntropy()
        ours, booster, valid = self.train(xgboost, digits, objective, objective.metric)
        theirs, _, _ = self.train(xgboost, digits, "multi:softprob")
        round_by_round((ours, theirs))
        scores = booster.predict(valid, output_margin=True)
        assert ours[-1] == pytest.approx(float(fastloss.cross_entropy(scores, digits[3])), abs=1e-6)

    def test_where_a_custom_objective_starts(self, xgboost):
        """From 0.5 for every class, which is what `base_score` says to their own one as well."""
        data = xgboost.DMatrix(np.zeros((4, 1)), [0, 0, 0, 1])
        params = {"num_class": 2, "eta": 0.0, "nthread": 1}
        ours = xgboost.train(params, data, 1, obj=XGBoostCrossEntropy())
        theirs = xgboost.train(params | {"objective": "multi:softprob", "base_score": 0.5}, data, 1)
        for booster in (ours, theirs):
            assert (booster.predict(data, output_margin=True) == 0.5).all()

    def test_sample_weights(self, xgboost, digits):
        rng = np.random.default_rng(0)
        weights = {"weight": rng.random(len(digits[2])) + 0.5, "valid_weight": rng.random(len(digits[3])) + 0.5}
        objective = XGBoostCrossEntropy()
        ours = self.train(xgboost, digits, objective, objective.metric, **weights)[0]
        round_by_round((ours, self.train(xgboost, digits, "multi:softprob", **weights)[0]))

    def test_class_weights_are_sample_weights_by_class(self, xgboost, digits):
        w = np.linspace(0.5, 3, 10)
        objective = XGBoostCrossEntropy(w)
        ours = self.train(xgboost, digits, objective, objective.metric)[0]
        weights = {"weight": w[digits[2]], "valid_weight": w[digits[3]]}
        round_by_round((ours, self.train(xgboost, digits, "multi:softprob", **weights)[0]))

    def test_label_smoothing_as_in_numpy(self, xgboost, digits):
        w = np.linspace(0.5, 3, 10)
        objective = XGBoostCrossEntropy(w, label_smoothing=0.2)
        ours = self.train(xgboost, digits, objective, objective.metric)[0]
        theirs = self.train(xgboost, digits, numpy_objective(w, 0.2, 2), objective.metric)[0]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
        assert ours[-1] < 0.9 * ours[0]

    def test_ignored_labels_teach_nothing(self, xgboost, digits):
        X, X_valid, y, y_valid = digits
        ignored = np.where(np.arange(len(y)) % 3 == 0, 77, y)
        objective = XGBoostCrossEntropy(ignore_index=77)
        # (The histograms' borders would follow the weights.)
        exact = {"tree_method": "exact"}
        ours = self.train(xgboost, (X, X_valid, ignored, y_valid), objective, objective.metric, **exact)[0]
        weight = (ignored != 77).astype(float)
        round_by_round((ours, self.train(xgboost, digits, "multi:softprob", weight=weight, **exact)[0]))

    def test_with_the_classifier(self, xgboost, digits):
        X, X_valid, y, y_valid = digits
        options = {"n_estimators": N_ROUNDS, "max_depth": 3, "base_score": 0.5, "n_jobs": 1}
        objective = XGBoostCrossEntropy()
        sample_weight = np.linspace(0.5, 1.5, len(y))
        curves = []
        for special in (
            {"objective": objective, "eval_metric": objective.metric, "num_class": 10},
            {"objective": "multi:softprob", "eval_metric": "mlogloss"},
        ):
            model = xgboost.XGBClassifier(**options, **special)
            model.fit(X, y, sample_weight=sample_weight, eval_set=[(X_valid, y_valid)], verbose=False)
            history = model.evals_result()["validation_0"]
            curves.append(history.get("cross_entropy") or history["mlogloss"])
        round_by_round(curves)


class TestLightGBM:
    def train(self, lightgbm, data, objective, metric=None, weight=None, valid_weight=None, start=None, **params):
        """Validation losses: of the custom metric, else of ``multi_logloss``."""
        X, X_valid, y, y_valid = data
        params = LIGHTGBM_OPTIONS | {"objective": objective, "boost_from_average": False} | params
        params["metric"] = "none" if metric else "multi_logloss"
        starts = [None if start is None else np.tile(start, (len(rows), 1)) for rows in (X, X_valid)]
        train = lightgbm.Dataset(X, y, weight=weight, init_score=starts[0], params={"verbose": -1})
        valid = lightgbm.Dataset(X_valid, y_valid, weight=valid_weight, init_score=starts[1], reference=train)
        history = {}
        lightgbm.train(params, train, N_ROUNDS, [valid], feval=metric, callbacks=[lightgbm.record_evaluation(history)])
        return history["valid_0"].get("cross_entropy") or history["valid_0"]["multi_logloss"]

    def test_without_options_it_is_their_softmax(self, lightgbm, digits):
        objective = LightGBMCrossEntropy()
        ours = self.train(lightgbm, digits, objective, objective.metric)
        round_by_round((ours, self.train(lightgbm, digits, "multiclass")))

    def test_from_the_frequencies(self, lightgbm, digits):
        """LightGBM's own objective starts there by default."""
        rng = np.random.default_rng(0)
        weights = {"weight": rng.random(len(digits[2])) + 0.5}
        objective = LightGBMCrossEntropy()
        start = objective.init_score(digits[2], weights["weight"])
        ours = self.train(lightgbm, digits, objective, objective.metric, start=start, **weights)
        round_by_round((ours, self.train(lightgbm, digits, "multiclass", boost_from_average=True, **weights)))

    def test_sample_weights(self, lightgbm, digits):
        rng = np.random.default_rng(0)
        weights = {"weight": rng.random(len(digits[2])) + 0.5, "valid_weight": rng.random(len(digits[3])) + 0.5}
        objective = LightGBMCrossEntropy()
        ours = self.train(lightgbm, digits, objective, objective.metric, **weights)
        round_by_round((ours, self.train(lightgbm, digits, "multiclass", **weights)))

    def test_class_weights_are_sample_weights_by_class(self, lightgbm, digits):
        w = np.linspace(0.5, 3, 10)
        objective = LightGBMCrossEntropy(w)
        ours = self.train(lightgbm, digits, objective, objective.metric)
        weights = {"weight": w[digits[2]], "valid_weight": w[digits[3]]}
        round_by_round((ours, self.train(lightgbm, digits, "multiclass", **weights)))

    def test_label_smoothing_as_in_numpy(self, lightgbm, digits):
        w = np.linspace(0.5, 3, 10)
        objective = LightGBMCrossEntropy(w, label_smoothing=0.2)
        ours = self.train(lightgbm, digits, objective, objective.metric)
        theirs = self.train(lightgbm, digits, numpy_objective(w, 0.2, 10 / 9), objective.metric)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
        assert ours[-1] < 0.9 * ours[0]

    def test_ignored_labels_teach_nothing(self, lightgbm, digits):
        X, X_valid, y, y_valid = digits
        ignored = np.where(np.arange(len(y)) % 3 == 0, 77, y)
        objective = LightGBMCrossEntropy(ignore_index=77)
        ours = self.train(lightgbm, (X, X_valid, ignored, y_valid), objective, objective.metric)
        weight = (ignored != 77).astype(float)
        round_by_round((ours, self.train(lightgbm, digits, "multiclass", weight=weight)))

    @pytest.mark.filterwarnings("ignore:The argument 'eval_set'")  # deprecated since 4.7, which names another
    def test_with_the_classifier(self, lightgbm):
        X, X_valid, y, y_valid = train_test_split(*load_wine(return_X_y=True), random_state=0)
        objective = LightGBMCrossEntropy()
        options = {"n_estimators": N_ROUNDS, "num_leaves": 7, "n_jobs": 1, "verbose": -1, "boost_from_average": False}
        curves = []
        for special, metric in (({"objective": objective}, objective.metric), ({}, "multi_logloss")):
            model = lightgbm.LGBMClassifier(**options, **special)
            weights = np.linspace(0.5, 1.5, len(y))
            model.fit(X, y, sample_weight=weights, eval_set=[(X_valid, y_valid)], eval_metric=metric)
            history = next(iter(model.evals_result_.values()))
            curves.append(history.get("cross_entropy") or history["multi_logloss"])
        round_by_round(curves)
