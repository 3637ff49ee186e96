"""The comparisons reject what they must."""

import numpy as np
import pytest

from tests.helpers.dense import assert_close, assert_near, finite_difference


@pytest.mark.parametrize("compare", [assert_close, assert_near])
@pytest.mark.parametrize("wrong", [0.0, np.nan, 1.0 + 1e-9])
def test_comparisons_reject(compare, wrong):
    compare(np.ones(3), np.ones(3))
    with pytest.raises(AssertionError):
        compare(np.full(3, wrong), np.ones(3))
    with pytest.raises(AssertionError):
        compare(np.ones(2), np.ones(3))


def test_assert_near_takes_what_cancels():
    assert_near(1e-16, 0.0)
    with pytest.raises(AssertionError):
        assert_close(1e-16, 0.0)


def test_finite_difference_leaves_the_parameter_as_it_was():
    x = np.array([1.0, -2.0])
    np.testing.assert_allclose(finite_difference(lambda: np.sum(x**3), x), [3.0, 12.0], rtol=1e-9)
    assert x.tolist() == [1.0, -2.0]
