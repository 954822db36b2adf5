"""Processes that work together: how they find each other, and sums over them (with threads)."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from toy_experiment import Records, ToyExperiment

from zegformer_jax.evaluation import loop
from zegformer_jax.evaluation.evaluator import Evaluator
from zegformer_jax.evaluation.metric import add
from zegformer_jax.runtime import processes
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.processes import join, sum_over_processes


@pytest.fixture
def together(monkeypatch):
    """Runs a function in one thread per argument; each thread acts as a process."""

    def run(function, arguments):
        barrier, slots = threading.Barrier(len(arguments), timeout=60), {}
        place = threading.local()

        def allgather(tree):
            slots[place.index] = tree
            barrier.wait()
            gathered = [slots[index] for index in range(len(arguments))]
            barrier.wait()

            def stack(*arrays):
                forms = {(x.shape, x.dtype) for x in arrays}
                assert forms == {(arrays[0].shape, np.dtype(np.uint8))}, "64 bits would be lost"
                return np.stack(arrays)

            return jax.tree.map(stack, *gathered)

        def process(index):
            place.index = index
            return function(arguments[index])

        monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
        monkeypatch.setattr(jax, "process_count", lambda: len(arguments))
        with ThreadPoolExecutor(len(arguments)) as threads:
            return list(threads.map(process, range(len(arguments))))

    return run


def test_processes_add_their_counts_in_64_bits(together):
    """A tree of integers beyond 32 bits, fractions and scalars."""
    trees = [
        {"a": (np.full((2, 3), 2**40 + i), np.array([0.1 * i, 2.0**-40])), "n": np.int64(2**33 * i)}
        for i in range(3)
    ]
    for total in together(sum_over_processes, trees):
        counts, fractions = total["a"]
        assert counts.dtype == np.int64 and fractions.dtype == np.float64
        np.testing.assert_array_equal(counts, np.full((2, 3), 3 * 2**40 + 3))
        np.testing.assert_array_equal(fractions, [0.0 + 0.1 + 0.2, 3 * 2.0**-40])
        assert total["n"] == 3 * 2**33


def test_one_process_returns_its_own_tree(monkeypatch):
    monkeypatch.setattr(multihost_utils, "process_allgather", pytest.fail)
    tree = {"a": np.arange(3)}
    assert sum_over_processes(tree) is tree


@pytest.mark.parametrize("order", [(0, 3), (3, 0)])
def test_a_process_without_images_adds_nothing(together, order):
    """It starts with zeros of the same shapes, so that all processes gather the same tree."""
    experiment = ToyExperiment(Records(5))
    batches = list(loop.validation_batches(experiment, experiment.source))

    def evaluate(count):
        evaluator = Evaluator(experiment)
        states = evaluator.nothing
        for batch in batches[:count]:
            states = add(states, evaluator(batch)[0])
        return sum_over_processes((states, np.int64(count)))

    alone = loop.evaluate(experiment, progress=False)
    for states, count in together(evaluate, order):
        assert count == len(batches) == 3
        jax.tree.map(np.testing.assert_array_equal, states, alone.states)


def test_a_number_of_a_process_that_is_none(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: pytest.fail("joined"))
    address = {"JAX_COORDINATOR_ADDRESS": "first:1234", "JAX_NUM_PROCESSES": "2"}
    with pytest.raises(UserError, match="^JAX_PROCESS_ID is 'one': set it to a whole number$"):
        join(address | {"JAX_PROCESS_ID": "one"})


@pytest.fixture
def slice_of(monkeypatch):
    """Makes this machine a host of a Cloud TPU slice: returns a function of the hosts."""
    cluster = pytest.importorskip("jax._src.clusters.cloud_tpu_cluster")

    def become(hosts):
        endpoints = ",".join(f"unknown:{index}:{host}" for index, host in enumerate(hosts))
        metadata = {"agent-worker-number": "1", "worker-network-endpoints": endpoints}
        monkeypatch.setattr(cluster, "get_metadata", lambda key: (metadata.get(key, ""), 200))
        monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", True)
        monkeypatch.setattr(processes, "has_libtpu", lambda: True)
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)

    return become


@pytest.mark.parametrize(
    "hosts, environment, joins",
    [
        (["10.0.0.1", "10.0.0.2"], {}, 1),
        (["10.0.0.1"], {}, 0),
        (["10.0.0.1", "10.0.0.2"], {"JAX_PLATFORMS": "cpu"}, 0),
        (["10.0.0.1"], {"TPU_WORKER_HOSTNAMES": "a,b"}, 1),  # in Kubernetes
    ],
)
def test_the_hosts_of_a_tpu_slice_join_without_variables(
    slice_of, monkeypatch, hosts, environment, joins
):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *options: calls.append(options))
    slice_of(hosts)
    join(environment)
    assert calls == [()] * joins
