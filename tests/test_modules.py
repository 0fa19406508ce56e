"""The classes: one implementation with the functions; options held, shown, compared, hashed, pickled, copied."""

import copy
import pickle
import warnings

import numpy as np
import pytest

import fastloss
from fastloss import CrossEntropyLoss, KLDivLoss, LogSoftmax, NLLLoss, Softmax

X = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2]], np.float32))
T = np.array([0, 2, 2])
Y = np.array([[0.2, 0.3, 0.5], [0.3, 0.3, 0.4], [1.0, 0.0, 0.0]], np.float32)
WEIGHT = np.array([1.0, 2.0, 0.5])

# An instance with each option away from its default, what it shows, and the call of the function that it stands for.
CASES = [
    pytest.param(
        lambda: CrossEntropyLoss(WEIGHT, ignore_index=2, reduction="sum", label_smoothing=0.25),
        "CrossEntropyLoss(weight=array([1. , 2. , 0.5]), ignore_index=2, reduction='sum', label_smoothing=0.25)",
        (X, T),
        lambda x, t: fastloss.cross_entropy(x, t, WEIGHT, None, 2, None, "sum", 0.25),
        id="CrossEntropyLoss",
    ),
    pytest.param(
        CrossEntropyLoss,
        "CrossEntropyLoss(weight=None, ignore_index=-100, reduction='mean', label_smoothing=0.0)",
        (X, Y),
        fastloss.cross_entropy,
        id="CrossEntropyLoss-probabilities",
    ),
    pytest.param(
        lambda: NLLLoss(WEIGHT, ignore_index=2, reduction="none"),
        "NLLLoss(weight=array([1. , 2. , 0.5]), ignore_index=2, reduction='none')",
        (X, T),
        lambda x, t: fastloss.nll_loss(x, t, WEIGHT, None, 2, None, "none"),
        id="NLLLoss",
    ),
    pytest.param(
        NLLLoss,
        "NLLLoss(weight=None, ignore_index=-100, reduction='mean')",
        (X, T),
        fastloss.nll_loss,
        id="NLLLoss-defaults",
    ),
    pytest.param(
        lambda: KLDivLoss(reduction="batchmean", log_target=True),
        "KLDivLoss(reduction='batchmean', log_target=True)",
        (X, X[::-1]),
        lambda x, y: fastloss.kl_div(x, y, reduction="batchmean", log_target=True),
        id="KLDivLoss",
    ),
    pytest.param(lambda: Softmax(0), "Softmax(dim=0)", (X,), lambda x: fastloss.softmax(x, 0), id="Softmax"),
    pytest.param(Softmax, "Softmax(dim=-1)", (X,), fastloss.softmax, id="Softmax-defaults"),
    pytest.param(
        lambda: LogSoftmax(0), "LogSoftmax(dim=0)", (X,), lambda x: fastloss.log_softmax(x, 0), id="LogSoftmax"
    ),
    pytest.param(LogSoftmax, "LogSoftmax(dim=-1)", (X,), fastloss.log_softmax, id="LogSoftmax-defaults"),
]


@pytest.mark.parametrize(("make", "shown", "arguments", "function"), CASES)
class TestEveryClass:
    def test_calls_the_function(self, make, shown, arguments, function):
        got, expected = make()(*arguments), function(*arguments)
        np.testing.assert_array_equal(got, expected, strict=True)
        assert type(got) is type(expected)

    def test_is_called_with_the_names_of_the_arguments(self, make, shown, arguments, function):
        names = dict(zip(("input", "target"), arguments, strict=False))
        np.testing.assert_array_equal(make()(**names), make()(*arguments))

    def test_shows_its_options(self, make, shown, arguments, function):
        assert repr(make()) == shown

    def test_what_it_shows_makes_it_again(self, make, shown, arguments, function):
        assert eval(shown, {**vars(fastloss), "array": np.array}) == make()

    def test_compares_and_hashes_by_its_options(self, make, shown, arguments, function):
        assert make() == make()
        assert hash(make()) == hash(make())
        assert make() != shown
        others = [case.values[0]() for case in CASES if case.values[1] != shown]
        assert make() not in others

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickles(self, make, shown, arguments, function, protocol):
        loaded = pickle.loads(pickle.dumps(make(), protocol))
        assert loaded == make()
        assert repr(loaded) == shown
        np.testing.assert_array_equal(loaded(*arguments), make()(*arguments))

    def test_copies(self, make, shown, arguments, function):
        assert copy.copy(make()) == make()
        assert copy.deepcopy(make()) == make()


@pytest.mark.parametrize("cls", [CrossEntropyLoss, NLLLoss])
class TestWeights:
    def test_the_array_that_was_given_may_change(self, cls):
        weight = WEIGHT.copy()
        loss = cls(weight)
        before = hash(loss), repr(loss), loss(X, T)
        weight *= 3
        assert (hash(loss), repr(loss), loss(X, T)) == before

    def test_each_part_of_an_array_counts(self, cls):
        weights = [None, WEIGHT, WEIGHT * 2, WEIGHT.astype(np.float32), WEIGHT[:2]]
        losses = [cls(weight) for weight in weights]
        assert len(set(losses)) == len(losses)
        assert all(a == b for a, b in zip(losses, [cls(weight) for weight in weights], strict=True))

    @pytest.mark.parametrize(
        ("weight", "error", "message"),
        [
            (["a", "b"], TypeError, "weight: got dtype <U1, expected a real dtype"),
            ([1j, 2], TypeError, "weight: got dtype complex128, expected a real dtype"),
            ([[1, 2]], ValueError, r"weight: got shape \(1, 2\), expected \(C,\): one weight per class"),
            (1.0, ValueError, r"weight: got shape \(\), expected \(C,\): one weight per class"),
        ],
    )
    def test_what_no_call_could_have(self, cls, weight, error, message):
        with pytest.raises(error, match=message):
            cls(weight)

    def test_the_layout_does_not_count(self, cls):
        assert cls(WEIGHT[::-1]) == cls(WEIGHT[::-1].copy())
        assert cls(WEIGHT.tolist()) == cls(WEIGHT)

    def test_array_likes(self, cls):
        pandas = pytest.importorskip("pandas")
        for weight in (list(WEIGHT), tuple(WEIGHT), pandas.Series(WEIGHT), memoryview(WEIGHT)):
            assert cls(weight)(X, T) == cls(WEIGHT)(X, T)


def test_options_are_values_of_plain_types():
    loss = CrossEntropyLoss(ignore_index=np.int8(3), label_smoothing=np.float32(0.5))
    assert repr(loss) == "CrossEntropyLoss(weight=None, ignore_index=3, reduction='mean', label_smoothing=0.5)"
    assert repr(Softmax(np.int64(1))) == "Softmax(dim=1)"


@pytest.mark.parametrize("cls", [CrossEntropyLoss, NLLLoss, KLDivLoss])
class TestTheDeprecatedPair:
    @pytest.mark.parametrize("size_average", [None, True, False])
    @pytest.mark.parametrize("reduce", [None, True, False])
    def test_becomes_a_reduction_when_the_object_is_made(self, cls, size_average, reduce):
        if size_average is None and reduce is None:
            assert cls(size_average=None, reduce=None, reduction="sum").reduction == "sum"
            return
        expected = "none" if reduce is False else "sum" if size_average is False else "mean"
        with pytest.warns(UserWarning, match=f"use reduction='{expected}' instead") as caught:
            loss = cls(size_average=size_average, reduce=reduce, reduction="sum")
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert loss.reduction == expected
        assert "size_average" not in repr(loss)

    def test_the_call_does_not_warn_again(self, cls):
        with pytest.warns(UserWarning, match="deprecated"):
            loss = cls(size_average=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss(X, Y if cls is KLDivLoss else T)


def test_kl_mean_warns_when_it_is_called():
    loss = KLDivLoss()
    with pytest.warns(UserWarning, match="batchmean") as record:
        loss(X, Y)
    assert record[0].filename == __file__
