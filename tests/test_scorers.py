"""The scorers inside scikit-learn: model selection, metadata routing, processes and threads, folds without a class."""

import contextlib
import copy
import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer, make_scorer
from sklearn.model_selection import (
    GridSearchCV,
    PredefinedSplit,
    cross_val_score,
    cross_validate,
    learning_curve,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastloss import metrics
from fastloss.metrics import neg_log_loss_from_logits_scorer, neg_log_loss_scorer

SCORERS = [neg_log_loss_scorer, neg_log_loss_from_logits_scorer]


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:600], y[:600]


@pytest.fixture(scope="module")
def few_digits():
    """Data on which a model without a scaler is fitted quickly."""
    X, y = load_digits(return_X_y=True)
    return X[:240] / 16, y[:240]


@pytest.fixture(scope="module")
def cancer():
    X, y = load_breast_cancer(return_X_y=True)
    return X[:200], np.where(y[:200], "benign", "malignant")


def pipeline(**options):
    return make_pipeline(StandardScaler(), LogisticRegression(**{"C": 0.1, "max_iter": 2000, **options}))


class Fixed(ClassifierMixin, BaseEstimator):
    """Probabilities and logits that do not depend on the data, for the classes it was fitted on."""

    def fit(self, X, y, sample_weight=None):
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, X):
        return np.log(self.predict_proba(X))

    def predict_proba(self, X):
        shares = np.arange(1.0, len(self.classes_) + 1)
        return np.tile(shares / shares.sum(), (len(X), 1))

    def predict(self, X):
        return np.repeat(self.classes_[-1], len(X))


class TestEqualScikitLearn:
    @pytest.mark.parametrize("scorer", SCORERS, ids=repr)
    @pytest.mark.parametrize("data", ["digits", "cancer"])
    def test_cross_val_score(self, request, scorer, data):
        X, y = request.getfixturevalue(data)
        expected = cross_val_score(pipeline(), X, y, scoring="neg_log_loss", cv=3)
        assert (expected < 0).all()
        np.testing.assert_allclose(cross_val_score(pipeline(), X, y, scoring=scorer, cv=3), expected, rtol=1e-12)

    def test_make_scorer(self, digits, cancer):
        for X, y in (digits, cancer):
            expected = cross_val_score(pipeline(), X, y, scoring="neg_log_loss", cv=3)
            made = make_scorer(metrics.log_loss, response_method="predict_proba", greater_is_better=False)
            np.testing.assert_allclose(cross_val_score(pipeline(), X, y, scoring=made, cv=3), expected, rtol=1e-12)
            made = make_scorer(
                metrics.log_loss_from_logits, response_method="decision_function", greater_is_better=False
            )
            np.testing.assert_allclose(cross_val_score(pipeline(), X, y, scoring=made, cv=3), expected, rtol=1e-12)

    def test_other_estimators(self, few_digits):
        X, y = few_digits
        X = X[:, 18:30]
        forest = RandomForestClassifier(5, random_state=0)
        expected = cross_val_score(forest, X, y, scoring="neg_log_loss", cv=2)
        np.testing.assert_allclose(cross_val_score(forest, X, y, scoring=neg_log_loss_scorer, cv=2), expected)
        boosted = HistGradientBoostingClassifier(max_iter=2, max_leaf_nodes=4, random_state=0)
        expected = cross_val_score(boosted, X, y, scoring="neg_log_loss", cv=2)
        for scorer in SCORERS:
            np.testing.assert_allclose(cross_val_score(boosted, X, y, scoring=scorer, cv=2), expected, rtol=1e-9)

    def test_grid_search_picks_the_same(self, digits):
        X, y = digits
        grid = {"logisticregression__C": [1e-2, 1.0, 100.0]}
        search = GridSearchCV(pipeline(), grid, scoring="neg_log_loss", cv=3).fit(X, y)
        assert search.best_params_["logisticregression__C"] not in (1e-2, 100.0)
        for scorer in SCORERS:
            ours = GridSearchCV(pipeline(), grid, scoring=scorer, cv=3).fit(X, y)
            assert ours.best_params_ == search.best_params_
            for key in ("mean_test_score", "rank_test_score"):
                np.testing.assert_allclose(ours.cv_results_[key], search.cv_results_[key], rtol=1e-12)
            assert ours.score(X, y) == pytest.approx(search.score(X, y), rel=1e-12)

    def test_cross_validate_with_several_scorers(self, digits):
        X, y = digits
        scoring = {"a": neg_log_loss_scorer, "b": neg_log_loss_from_logits_scorer, "c": "neg_log_loss"}
        scores = cross_validate(pipeline(), X, y, scoring=scoring, cv=3, return_train_score=True)
        for part in ("test", "train"):
            for name in "ab":
                np.testing.assert_allclose(scores[f"{part}_{name}"], scores[f"{part}_c"], rtol=1e-12)

    @pytest.mark.parametrize("scorer", SCORERS, ids=repr)
    def test_learning_curve(self, digits, scorer):
        X, y = digits
        options = {"train_sizes": [0.5, 1.0], "cv": 2}
        *_, expected = learning_curve(pipeline(), X, y, scoring="neg_log_loss", **options)
        *_, found = learning_curve(pipeline(), X, y, scoring=scorer, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-12)

    def test_frames_with_an_index(self, digits):
        X, y = digits
        index = np.random.default_rng(0).permutation(len(y)) + 1000
        frame, series = pd.DataFrame(X, index=index), pd.Series(y, index=index).map("digit {}".format)
        expected = cross_val_score(pipeline(), frame, series, scoring="neg_log_loss", cv=2)
        for scorer in SCORERS:
            found = cross_val_score(pipeline(), frame, series, scoring=scorer, cv=2)
            np.testing.assert_allclose(found, expected, rtol=1e-12)


# Run in a process of its own, so that whatever becomes of its workers, it ends.
TWO_JOBS = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import joblib
import numpy as np
from joblib.externals.loky import get_reusable_executor
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer
from sklearn.model_selection import GridSearchCV, cross_val_score
from fastloss import metrics

X, y = load_digits(return_X_y=True)
X, y = X[:200] / 16, y[:200]
model = LogisticRegression()
made = make_scorer(metrics.log_loss, response_method="predict_proba", greater_is_better=False)
scorers = [metrics.neg_log_loss_scorer, metrics.neg_log_loss_from_logits_scorer, made, "neg_log_loss"]
large, labels = np.random.default_rng(0).dirichlet(np.ones(4), 40_000), np.arange(40_000) % 4

def score(_):
    return metrics.log_loss(labels, large)

if __name__ == "__main__":
    losses = [score(0)]  # in parallel, before there are workers and while there are
    with joblib.parallel_config(sys.argv[1], n_jobs=2):
        found = [cross_val_score(model, X, y, scoring=s, cv=2).tolist() for s in scorers]
        losses += joblib.Parallel()(joblib.delayed(score)(i) for i in range(8))
        losses.append(score(0))
        search = GridSearchCV(model, {"C": [1e-3, 1]}, scoring=scorers[0], cv=2).fit(X, y)
    get_reusable_executor().shutdown(wait=True)
    with ThreadPoolExecutor(4) as pool:  # one in parallel, the others beside it serially
        losses += pool.map(score, range(12))
    print(json.dumps([found, search.best_params_, losses]))
"""


class TestProcessesAndThreads:
    @pytest.mark.parametrize("backend", ["loky", "threading"])
    def test_two_jobs(self, tmp_path, backend):
        path = tmp_path / "two_jobs.py"
        path.write_text(TWO_JOBS)
        command = [sys.executable, "-W", "error", str(path), backend]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        (*ours, theirs), best, losses = json.loads(done.stdout)
        assert len(theirs) == 2
        for scores in ours:
            np.testing.assert_allclose(scores, theirs, rtol=1e-12)
        assert best == {"C": 1}
        assert len(losses) == 22
        assert len(set(losses)) == 1

    @pytest.mark.parametrize("scorer", SCORERS, ids=repr)
    def test_copies(self, scorer):
        for copied in (pickle.loads(pickle.dumps(scorer)), copy.copy(scorer), copy.deepcopy(scorer)):
            assert copied == scorer
            assert hash(copied) == hash(scorer)
            assert repr(copied) == repr(scorer)
        assert SCORERS[0] != SCORERS[1]

    def test_repr_is_the_name(self):
        for scorer in SCORERS:
            assert getattr(metrics, repr(scorer).removeprefix("fastloss.metrics.")) is scorer


class TestClasses:
    """Three classes, of which some are not in each fold."""

    X = np.zeros((12, 1))
    folds = PredefinedSplit(np.repeat([0, 1], 6))

    @pytest.mark.parametrize("scorer", SCORERS, ids=repr)
    @pytest.mark.parametrize("names", [[0, 1, 2], [3, 5, 7], ["a", "b", "c"]])
    def test_a_test_fold_without_a_class(self, scorer, names):
        names = np.array(names)
        model = Fixed().fit(self.X, names[[0, 1, 2] * 4])
        for codes in ([0, 2, 2], [1], [2, 2]):
            expected = np.log((np.array(codes) + 1) / 6).mean()
            assert scorer(model, self.X[: len(codes)], names[codes]) == pytest.approx(expected, rel=1e-12)

    def test_a_test_fold_of_one_class_out_of_two(self):
        model = Fixed().fit(self.X, [0, 1] * 6)
        for scorer in SCORERS:
            assert scorer(model, self.X[:2], [1, 1]) == pytest.approx(np.log(2 / 3), rel=1e-12)

    @pytest.mark.parametrize("scorer", SCORERS, ids=repr)
    def test_in_cross_validation(self, scorer):
        y = np.array([0, 1, 2] * 2 + [0, 1, 2, 0, 0, 1])
        y[6:] = np.where(y[6:] == 2, 1, y[6:])
        # the second fold lacks class 2; the model of the first was trained without it, and cannot be scored on it
        scores = cross_val_score(Fixed(), self.X, y, scoring=scorer, cv=[(np.arange(6), np.arange(6, 12))])
        np.testing.assert_allclose(scores, [np.log((y[6:] + 1) / 6).mean()], rtol=1e-12)
        with pytest.raises(ValueError, match=r"y_true contains values \{2\} not belonging to the passed labels"):
            cross_val_score(Fixed(), self.X, y, scoring=scorer, cv=self.folds, error_score="raise")

    def test_an_estimator_without_classes(self):
        class Bare:
            def predict_proba(self, X):
                return [[0.25, 0.75]] * len(X)

        assert neg_log_loss_scorer(Bare(), self.X[:2], ["a", "b"]) == pytest.approx(np.log([0.25, 0.75]).mean())

    def test_several_labels_per_row(self):
        """As scikit-learn's scorer has it: a column for each, and no ``labels``."""
        rng = np.random.default_rng(0)
        X = rng.normal(size=(60, 3))
        y = (X + rng.normal(size=X.shape) > 0).astype(int)
        for model in (RandomForestClassifier(5, random_state=0), OneVsRestClassifier(LogisticRegression())):
            model.fit(X, y)
            with pytest.warns(UserWarning, match="do not sum to one"):
                expected = get_scorer("neg_log_loss")(model, X, y)
            for labels in (y, y.tolist(), pd.DataFrame(y)):
                with pytest.warns(UserWarning, match="do not sum to one"):
                    found = neg_log_loss_scorer(model, X, labels)
                assert found == pytest.approx(expected, rel=1e-12)

    def test_labels_of_every_kind(self):
        model = Fixed().fit(self.X, np.array(["a", "b", "c"] * 4))
        expected = np.log([1 / 6, 3 / 6]).mean()
        for labels in (["a", "c"], ("a", "c"), np.array([["a"], ["c"]]), pd.Series(["a", "c"]), [["a"], ["c"]]):
            assert neg_log_loss_scorer(model, X=self.X[:2], y_true=labels) == pytest.approx(expected, rel=1e-12)

    def test_an_estimator_without_the_method(self):
        with pytest.raises(AttributeError, match="decision_function"):
            neg_log_loss_from_logits_scorer(RandomForestClassifier().fit(self.X, [0, 1] * 6), self.X, [0, 1] * 6)


class TestWeights:
    @pytest.fixture
    def weights(self, few_digits, rng):
        return rng.random(len(few_digits[1]))

    @pytest.mark.parametrize("scorer", SCORERS, ids=repr)
    def test_of_a_call(self, few_digits, weights, scorer):
        X, y = few_digits
        model = pipeline().fit(X, y)
        expected = -sklearn.metrics.log_loss(y, model.predict_proba(X), sample_weight=weights)
        assert scorer(model, X, y, sample_weight=weights) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("scorer", SCORERS, ids=repr)
    def test_through_metadata_routing(self, few_digits, weights, scorer):
        X, y = few_digits
        with sklearn.config_context(enable_metadata_routing=True):
            model = LogisticRegression().set_fit_request(sample_weight=True)
            theirs = get_scorer("neg_log_loss").set_score_request(sample_weight=True)
            ours = scorer.set_score_request(sample_weight=True)
            options = {"params": {"sample_weight": weights}, "cv": 3}
            expected = cross_validate(model, X, y, scoring=theirs, **options)["test_score"]
            np.testing.assert_allclose(
                cross_validate(model, X, y, scoring=ours, **options)["test_score"], expected, rtol=1e-12
            )
            several = cross_validate(model, X, y, scoring={"ours": ours, "theirs": theirs}, **options)
            np.testing.assert_allclose(several["test_ours"], expected, rtol=1e-12)
            search = GridSearchCV(model, {"C": [0.1, 1.0]}, scoring=ours, cv=3).fit(X, y, sample_weight=weights)
            np.testing.assert_allclose(search.cv_results_["mean_test_score"][1], expected.mean(), rtol=1e-12)
            # not asked for: not passed
            unweighted = cross_validate(model, X, y, scoring=scorer.set_score_request(sample_weight=False), **options)[
                "test_score"
            ]
            assert not np.allclose(unweighted, expected)
            # under another name
            ours = scorer.set_score_request(sample_weight="score_weight")
            options["params"] = {"sample_weight": weights, "score_weight": weights}
            np.testing.assert_allclose(
                cross_validate(model, X, y, scoring=ours, **options)["test_score"], expected, rtol=1e-12
            )

    @pytest.mark.parametrize("scorer", SCORERS, ids=repr)
    def test_routing_wants_a_request(self, few_digits, weights, scorer):
        X, y = few_digits
        with sklearn.config_context(enable_metadata_routing=True):
            model = LogisticRegression().set_fit_request(sample_weight=True)
            with pytest.raises(UnsetMetadataPassedError, match=r"log_loss.*scorer\.set_score_request"):
                cross_validate(model, X, y, scoring=scorer, params={"sample_weight": weights}, cv=3)

    @pytest.mark.parametrize("scorer", SCORERS, ids=repr)
    def test_a_request_makes_another_scorer(self, scorer):
        with sklearn.config_context(enable_metadata_routing=True):
            ours = scorer.set_score_request(sample_weight=True)
            assert ours != scorer
            assert pickle.loads(pickle.dumps(ours)) == ours
            assert scorer.get_metadata_routing().score.requests == {"sample_weight": None}
            assert ours.get_metadata_routing().score.requests == {"sample_weight": True}
            assert repr(ours) == f"{scorer!r}.set_score_request(sample_weight=True)"

    @pytest.mark.parametrize("scorer", SCORERS, ids=repr)
    @pytest.mark.parametrize("request_", [[1], 2.0, "a b", "", ["weights"]])
    def test_what_is_no_request(self, scorer, request_):
        with sklearn.config_context(enable_metadata_routing=True):
            for setter in (scorer.set_score_request, get_scorer("neg_log_loss").set_score_request):
                with pytest.raises(ValueError, match=r"`sample_weight` should be either a valid identifier or one of"):
                    setter(sample_weight=request_)

    @pytest.mark.parametrize("scorer", SCORERS, ids=repr)
    def test_a_request_for_nothing_changes_nothing(self, scorer):
        with sklearn.config_context(enable_metadata_routing=True):
            for asked in (scorer, *(scorer.set_score_request(sample_weight=w) for w in (True, False, None, "name"))):
                assert asked.set_score_request() == asked

    def test_a_request_without_routing(self):
        with pytest.raises(RuntimeError, match="enable_metadata_routing=True"):
            neg_log_loss_scorer.set_score_request(sample_weight=True)

    def test_make_scorer_takes_weights(self, few_digits, weights):
        X, y = few_digits
        with sklearn.config_context(enable_metadata_routing=True):
            made = make_scorer(metrics.log_loss, response_method="predict_proba", greater_is_better=False)
            made = made.set_score_request(sample_weight=True)
            theirs = get_scorer("neg_log_loss").set_score_request(sample_weight=True)
            model = LogisticRegression().set_fit_request(sample_weight=True)
            options = {"params": {"sample_weight": weights}, "cv": 3}
            expected = cross_validate(model, X, y, scoring=theirs, **options)["test_score"]
            found = cross_validate(model, X, y, scoring=made, **options)["test_score"]
            np.testing.assert_allclose(found, expected, rtol=1e-12)

    def test_searches_without_routing_pass_weights(self, few_digits, weights):
        """As scikit-learn's searches do with its own scorers."""
        X, y = few_digits
        grid = {"C": [0.1, 1.0]}
        model = LogisticRegression()
        expected = GridSearchCV(model, grid, scoring="neg_log_loss", cv=3).fit(X, y, sample_weight=weights)
        for scoring, key in ((neg_log_loss_scorer, "score"), ({"name": neg_log_loss_scorer}, "name")):
            found = GridSearchCV(model, grid, scoring=scoring, refit=key, cv=3).fit(X, y, sample_weight=weights)
            np.testing.assert_allclose(
                found.cv_results_[f"mean_test_{key}"], expected.cv_results_["mean_test_score"], rtol=1e-12
            )


def test_the_example_of_the_readme():
    section = (Path(__file__).parents[1] / "README.md").read_text().split("### With scikit-learn\n")[1].split("\n##")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    expected = re.search(r"```text\n(.*?)```", section, re.DOTALL).group(1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected
