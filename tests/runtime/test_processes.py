"""What several processes gather, with threads in place of processes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from zegformer_jax.evaluation.counts import OVERLAP, Evaluation
from zegformer_jax.evaluation.subsets import load_subsets
from zegformer_jax.runtime.processes import gather
from zegformer_jax.text.vocabulary import Vocabulary


@pytest.fixture
def together(monkeypatch):
    """Runs a function in as many threads as there are arguments; each is as a process."""

    def run(function, arguments):
        barrier, slots = threading.Barrier(len(arguments), timeout=10), {}
        place = threading.local()

        def allgather(array):
            slots[place.index] = array
            barrier.wait()
            gathered = [slots[index] for index in range(len(arguments))]
            assert len({(x.shape, x.dtype) for x in gathered}) == 1, "a collective's arrays differ"
            barrier.wait()
            return np.stack(gathered)

        def process(index):
            place.index = index
            return function(arguments[index])

        monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
        monkeypatch.setattr(jax, "process_count", lambda: len(arguments))
        with ThreadPoolExecutor(len(arguments)) as threads:
            return list(threads.map(process, range(len(arguments))))

    return run


def test_what_a_process_lacks_is_zeros(together):
    matrix, big = np.arange(6, dtype=np.int32).reshape(2, 3), np.array(2**40 + 1)
    arguments = [{}, {("a", "b"): matrix, ("n",): big}, {("x, y", "ä"): np.array([0.5, np.nan])}]
    answers = together(gather, arguments)
    for answer in answers:
        assert [set(arrays) for arrays in answer] == [{("a", "b"), ("n",), ("x, y", "ä")}] * 3
        for own, arrays in zip(arguments, answer, strict=True):
            for key, array in arrays.items():
                sample = answers[0][1 if key != ("x, y", "ä") else 2][key]
                expected = own.get(key, np.zeros_like(sample))
                assert array.dtype == sample.dtype
                np.testing.assert_array_equal(array, expected)


def test_processes_that_count_other_things_are_told(together):
    matrices = [{("clip", "voc"): np.zeros((size, size), int)} for size in (2, 3)]
    with pytest.raises(ValueError, match=r"\('clip', 'voc'\): is \(\(3, 3\), .* in process 1"):
        together(gather, matrices)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_process_without_pictures_adds_nothing(together, order):
    vocabulary = Vocabulary.from_names(["a", "b"], [True, False])
    subsets = load_subsets((), vocabulary, "folder")
    counts = {("clip", "folder"): np.array([[3, 1], [0, 2]], np.int32)}
    counts[OVERLAP] = np.array([[0.5, 1], [0.25, 1], [1, 1]], np.float32)
    processes = []
    for pictures in order:
        result = Evaluation(subsets, vocabulary, "clip", pictures=pictures, of=1)
        processes.append(result)
        if pictures:
            result.add(counts)
    together(Evaluation.add_hosts, processes)
    for result in processes:
        assert result.pictures == 1 and not result.partial
        assert result.confusion["clip", "folder"].dtype == np.int64
        np.testing.assert_array_equal(result.confusion["clip", "folder"], [[3, 1], [0, 2]])
        np.testing.assert_array_equal(result.overlap, [[0.5, 1], [0.25, 1], [1, 1]])
