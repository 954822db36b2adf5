"""Python functions inside tf.data. TensorFlow sees no GPU."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

tf.config.set_visible_devices([], "GPU")


class Calls:
    """A Python function inside tf.data, whose own errors reach the caller."""

    def __init__(self, function: Callable[..., tuple], types: Sequence[tf.DType]):
        """Takes the function.

        Args:
            function: Maps integers to arrays; may run in several threads at once.
            types: Types of the arrays.
        """
        self._function = function
        self._types = types
        self._errors: list[Exception] = []

    def __call__(self, *numbers: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Calls the function on tensors."""
        return tf.numpy_function(self._call, numbers, self._types, stateful=False)

    def _call(self, *numbers: np.ndarray) -> tuple:
        try:
            return self._function(*numbers)
        except Exception as error:
            self._errors.append(error)
            raise

    def iterate(self, dataset: tf.data.Dataset) -> Iterator[dict[str, Any]]:
        """Yields the elements of a tf.data dataset as arrays."""
        try:
            yield from dataset.as_numpy_iterator()
        except tf.errors.OpError:
            if not self._errors:
                raise
            raise self._errors[0] from None


def thread_options(threads: int) -> tf.data.Options:
    """Returns options for a private pool of this many threads, without autotuning."""
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.autotune.enabled = False
    return options
