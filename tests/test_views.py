"""The geometry of arrays: axes merged, arrays cut in pieces, strides that follow on, dtypes of results."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastloss
from fastloss import _views

DTYPES = ["f2", "f4", "f8", "i1", "i8", "u8", "?", ">f4", ">f8", ">f2"]

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def elements(shape, strides):
    """Where the elements of some arrays of one shape lie, as a set of tuples of offsets."""
    return {
        tuple(sum(i * s for i, s in zip(place, steps, strict=True)) for steps in strides) for place in np.ndindex(shape)
    }


class TestMergeAxes:
    @pytest.mark.parametrize(
        ("shape", "strides", "merged"),
        [
            ((), ((),), ((1,), ((0,),))),
            ((1, 1), ((7, 3),), ((1,), ((0,),))),
            ((4, 5), ((5, 1),), ((20,), ((1,),))),
            ((4, 5), ((1, 4),), ((20,), ((1,),))),
            ((4, 5), ((10, 1),), ((4, 5), ((10, 1),))),
            ((4, 5), ((-5, -1),), ((20,), ((-1,),))),
            ((4, 5), ((5, 1), (1, 4)), ((4, 5), ((5, 1), (1, 4)))),
            ((4, 5), ((1, 4), (5, 1)), ((5, 4), ((4, 1), (1, 5)))),
            ((4, 5), ((5, 1), (0, 0)), ((20,), ((1,), (0,)))),
            ((4, 5), ((5, 1), (0, 1)), ((4, 5), ((5, 1), (0, 1)))),
            ((2, 3, 4), ((12, 4, 1), (24, 8, 2)), ((24,), ((1,), (2,)))),
            ((2, 3, 1, 4), ((100, 4, 77, 1),), ((2, 12), ((100, 1),))),
        ],
    )
    def test_examples(self, shape, strides, merged):
        assert _views.merge_axes(shape, strides) == merged

    @given(shapes, st.data())
    def test_the_elements_stay_the_same(self, shape, data):
        steps = st.tuples(*[st.integers(-30, 30)] * len(shape))
        strides = data.draw(st.lists(steps, min_size=1, max_size=3).map(tuple))
        merged_shape, merged_strides = _views.merge_axes(shape, strides)
        assert len(merged_strides) == len(strides)
        assert math.prod(merged_shape) == math.prod(shape)
        assert elements(merged_shape, merged_strides) == elements(shape, strides)

    @given(st.permutations(range(4)), st.permutations(range(4)))
    def test_dense_arrays_of_one_memory_order_are_one_axis(self, order, other):
        shape = (2, 3, 4, 5)
        array = np.empty([shape[a] for a in order], np.uint8).transpose(np.argsort(order))
        merged_shape, merged_strides = _views.merge_axes(shape, (array.strides, array.strides))
        assert merged_shape == (120,)
        assert merged_strides == ((1,), (1,))
        view = np.empty([shape[a] for a in other], np.uint8).transpose(np.argsort(other))
        if order != other:
            assert len(_views.merge_axes(shape, (array.strides, view.strides))[0]) > 1


class TestPieces:
    @pytest.mark.parametrize("limit", [1, 7, 100])
    @pytest.mark.parametrize("shape", [(), (0,), (1,), (13,), (4, 5), (3, 0, 2), (2, 30, 3, 4), (50, 3)], ids=str)
    def test_cover_every_element_once(self, monkeypatch, shape, limit):
        monkeypatch.setattr(_views, "PIECE", limit)
        for count in range(len(shape) + 1):
            for whole in itertools.combinations(range(len(shape)), count):
                visits = np.zeros(shape, int)
                numbers = np.arange(math.prod(shape)).reshape(shape)
                seen = []
                for cut in _views.pieces(shape, whole):
                    visits[cut] += 1
                    seen.append(numbers[cut].ravel())
                    assert all(cut[a] == slice(0, shape[a]) for a in whole)
                    whole_size = math.prod(shape[a] for a in whole)
                    assert visits[cut].size <= max(limit, whole_size)
                assert (visits == 1).all()
                if not whole and visits.size:
                    np.testing.assert_array_equal(np.concatenate(seen), numbers.ravel())

    def test_pieces_are_not_needlessly_small(self):
        assert len(list(_views.pieces((1000, 100)))) == 1
        assert len(list(_views.pieces((_views.PIECE * 3,)))) == 3
        assert len(list(_views.pieces((3, _views.PIECE)))) == 3


class TestFollowsOn:
    ARRAY = np.zeros((2, 3, 4, 5), np.float32)

    @pytest.mark.parametrize(
        ("axes", "expected"),
        [
            ((), True), ((0,), True), ((2, 3), True), ((0, 1, 2, 3), True), ((0, 1), True), ((1, 2), True),
            ((0, 2), False), ((1, 3), False), ((0, 1, 3), False),
        ],
    )  # fmt: skip
    def test_axes_of_a_dense_array(self, axes, expected):
        assert _views.follows_on(self.ARRAY, axes) is expected

    def test_other_layouts(self):
        assert not _views.follows_on(self.ARRAY.T, (0, 1))
        assert not _views.follows_on(self.ARRAY[:, :, :3], (1, 2))
        assert _views.follows_on(self.ARRAY[::-1, ::-1], (0, 1)) is True
        assert _views.follows_on(self.ARRAY[:, :1, :, :], (1, 2))
        assert _views.follows_on(np.broadcast_to(np.float32(1), (3, 4)), (0, 1))


class TestDtypes:
    @pytest.mark.parametrize(("a", "b"), list(itertools.product(DTYPES, repeat=2)))
    def test_results_follow_numpy_with_halves_as_float32(self, a, b):
        def counted_as(name):
            dtype = np.dtype(name).newbyteorder("=")
            if dtype.kind != "f":
                return np.dtype(np.float64)
            return np.dtype(np.float32) if dtype.itemsize == 2 else dtype

        assert _views.compute_dtype(np.dtype(a)) == counted_as(a)
        assert _views.compute_dtype(np.dtype(a), np.dtype(b)) == np.promote_types(counted_as(a), counted_as(b))

    def test_bfloat16(self):
        bfloat16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
        assert _views.compute_dtype(bfloat16) == np.float32
        assert _views.compute_dtype(bfloat16, np.dtype("f2")) == np.float32
        assert _views.compute_dtype(np.dtype("f8"), bfloat16) == np.float64
        assert _views.storage_dtype(bfloat16) == np.int16

    def test_storage(self):
        assert _views.storage_dtype(np.dtype("f2")) == np.uint16
        assert _views.storage_dtype(np.dtype("f4")) == np.float32


class TestFlatten:
    @pytest.mark.parametrize(
        "view",
        [
            lambda a: a, lambda a: a.T, lambda a: a[::-1], lambda a: a[:, ::-2], lambda a: a[1:, 2:4], lambda a: a[2:3],
            lambda a: np.broadcast_to(a[0], (3, *a.shape[1:])),
        ],
        ids=["dense", "transposed", "reversed", "backwards", "window", "one_row", "broadcast"],
    )  # fmt: skip
    @pytest.mark.parametrize("writeable", [True, False])
    def test_every_element_is_found_and_nothing_beyond(self, view, writeable):
        base = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
        base.flags.writeable = writeable
        array = view(base)
        flat, (*_, origin) = _views.flatten(array)
        origin //= array.itemsize
        assert flat.ndim == 1
        assert np.shares_memory(flat, base)
        steps = [s // array.itemsize for s in array.strides]
        offsets = np.array(
            [origin + sum(i * s for i, s in zip(p, steps, strict=True)) for p in np.ndindex(array.shape)]
        )
        np.testing.assert_array_equal(flat[offsets], array.ravel())
        assert offsets.min() >= 0
        assert offsets.max() == len(flat) - 1

    def test_the_memory_outlives_the_array(self):
        flat, _ = _views.flatten(np.arange(1000.0)[::-1])
        np.testing.assert_array_equal(np.sort(flat), np.arange(1000.0))

    def test_lies_well(self):
        array = np.zeros((3, 4), np.float32)
        assert _views.lies_well(array)
        assert _views.lies_well(array[::-1, ::2])
        assert not _views.lies_well(array.astype(">f4"))
        assert not _views.lies_well(array.astype(int))
        assert not _views.lies_well(np.zeros(17, np.uint8)[1:].view(np.float32))
        assert not _views.lies_well(np.zeros(3, [("flag", "u1"), ("value", "f4")])["value"])
        padded = np.zeros(
            3, np.dtype({"names": ["a", "b"], "formats": ["f8", "f4"], "offsets": [0, 8], "itemsize": 12})
        )
        assert not _views.lies_well(padded["a"])


class TestRepeatedSmallCalls:
    """What a call of the same shapes, dtypes and options has left behind serves those alone that it fits."""

    @pytest.fixture
    def logits(self, rng):
        return rng.normal(size=(32, 10)).astype(np.float32)

    def expected(self, x, t):
        x = x.astype(np.float64)
        return (np.log(np.exp(x).sum(1)) - x[np.arange(len(x)), t]).mean()

    def test_layouts_of_one_shape_in_any_order(self, logits):
        t = np.arange(32) % 10
        buffer = np.zeros(logits.nbytes + 1, np.uint8)
        unaligned = buffer[1:].view(np.float32).reshape(logits.shape)
        unaligned[...] = logits
        read_only = logits.copy()
        read_only.flags.writeable = False
        layouts = [logits, np.asfortranarray(logits), unaligned, np.repeat(logits, 2, 1)[:, ::2], read_only]
        for x in [*layouts, *layouts[::-1], *layouts]:
            np.testing.assert_allclose(fastloss.cross_entropy(x, t), self.expected(logits, t), rtol=2e-6)
            np.testing.assert_allclose(fastloss.logsumexp(x, 1), np.log(np.exp(logits).sum(1)), rtol=2e-6)
            np.testing.assert_allclose(fastloss.softmax(x).sum(1), np.ones(32), rtol=2e-6)

    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    def test_a_target_out_of_range_after_good_ones(self, logits, reduction):
        good, bad = np.arange(32) % 10, np.arange(32) % 10
        bad[3] = 10
        for loss in (fastloss.cross_entropy, fastloss.nll_loss):
            for _ in range(2):
                loss(logits, good, reduction=reduction)
                with pytest.raises(IndexError, match="got 10 at 3"):
                    loss(logits, bad, reduction=reduction)

    def test_all_ignored_after_none(self, logits):
        for target, is_nan in ((np.zeros(32, int), False), (np.full(32, -100), True)) * 2:
            assert np.isnan(fastloss.cross_entropy(logits, target)) == is_nan

    def test_an_equal_option_of_another_type_is_refused(self, logits):
        fastloss.cross_entropy(logits, np.zeros(32, int), ignore_index=1)
        with pytest.raises(TypeError, match="ignore_index"):
            fastloss.cross_entropy(logits, np.zeros(32, int), ignore_index=1.0)
