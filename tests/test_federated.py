"""The pool and its rows point at the images the partition named."""

import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.data.dataset import Dataset
from fedmetanas_jax.data.federated import federate
from fedmetanas_jax.data.partition import Partition


def test_rows_of_the_pool():
    rng = np.random.default_rng(0)
    dataset = Dataset(
        train_images=rng.integers(0, 256, (7, 2, 3, 1), np.uint8),
        train_labels=np.arange(7, dtype=np.int32) % 3,
        test_images=rng.integers(0, 256, (4, 2, 3, 1), np.uint8),
        test_labels=np.array([2, 1, 0, 2], np.int32),
        label_names=("a", "b", "c"),
    )
    parts = Partition(
        train=[np.array([6, 1]), np.array([0, 3, 5, 2, 1])], test=[np.array([3, 0, 1]), np.array([2])]
    )
    data = federate(dataset, parts)
    assert data.image.shape == (11, 2, 3, 1)
    assert data.image.dtype == jnp.uint8
    assert {x.dtype for x in data[1:]} == {jnp.dtype(jnp.int32)}
    assert data.train.tolist() == [[6, 1, 6, 1, 6], [0, 3, 5, 2, 1]]
    assert data.train_size.tolist() == [2, 5]
    assert data.test.tolist() == [[10, 7, 8], [9, 9, 9]]
    assert data.test_size.tolist() == [3, 1]
    np.testing.assert_array_equal(data.image[data.train[1]], dataset.train_images[[0, 3, 5, 2, 1]])
    np.testing.assert_array_equal(data.label[data.test[0]], dataset.test_labels[[3, 0, 1]])
    np.testing.assert_array_equal(data.image[data.central], dataset.test_images)
    np.testing.assert_array_equal(data.label[data.central], dataset.test_labels)
    assert np.isin(data.test, data.central).all()
