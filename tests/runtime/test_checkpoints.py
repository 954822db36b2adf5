"""Checkpoints: which are kept, and how damaged ones are handled."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zegformer_jax.experiment.workdir import load_variables
from zegformer_jax.runtime.checkpoints import DAMAGED_FOLDER, FOLDER, Checkpoints, Damaged, sum_bits
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.mesh import make_mesh, replicate, shard_arrays

# If one of Orbax's reads fails, the others may end after its event loop.
pytestmark = pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")


def make_state(value=0.0):
    kernel = jnp.arange(256 * 96, dtype=jnp.float32).reshape(256, 96) + value
    return {"params": {"kernel": kernel, "scale": jnp.float32(value)}, "ema": {}, "constants": {}}


def save(workdir, steps, keep=2, scores=()):
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            score = dict(scores).get(step)
            checkpoints.save(step, make_state(step), {"config": "x"}, score)


def spoil(workdir, step):
    """Inverts the middle byte of each data file."""
    for path in (workdir / FOLDER / str(step) / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, range(1, 8), scores={2: 0.5, 4: 0.3, 7: 0.4})
    kept = sorted(int(x.name) for x in (tmp_path / FOLDER).iterdir())
    assert kept == [2, 6, 7]
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (7, 2)
    for which, value in (("latest", 7), ("best", 2)):
        assert load_variables(tmp_path, which)["params"]["scale"] == value


def test_without_a_validation_there_is_no_best(tmp_path):
    save(tmp_path, [1])
    with pytest.raises(FileNotFoundError, match="no checkpoint here was validated"):
        load_variables(tmp_path, "best")
    with pytest.raises(ValueError, match="eval.checkpoint 'first': choose latest or best"):
        load_variables(tmp_path, "first")


@pytest.mark.parametrize("damage", ["bits", "missing", "cut"])
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(tmp_path, damage):
    save(tmp_path, [1, 2])
    files = list((tmp_path / FOLDER / "2" / "state").rglob("d/*"))
    if damage == "bits":
        spoil(tmp_path, 2)
    for path in files if damage != "bits" else []:
        path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:20])
    lines = []
    with Checkpoints(tmp_path, 2) as checkpoints:
        state = checkpoints.restore(make_state(), lines.append)
        assert checkpoints.latest_step == 1
        checkpoints.save(2, make_state(2))
    jax.tree.map(np.testing.assert_array_equal, state, make_state(1))
    assert len(lines) == 1 and lines[0].startswith("checkpoint 2 is damaged (")
    assert lines[0].endswith("resuming from 1")
    assert [x.name.split("_")[0] for x in (tmp_path / DAMAGED_FOLDER).iterdir()] == ["2"]


def test_readable_arrays_that_differ_from_the_saved_ones_are_damaged(tmp_path):
    """Another checkpoint's files in its place: only the sums of the bits reveal it."""
    save(tmp_path, [1, 2, 3])
    folders = [tmp_path / FOLDER / step / "state" for step in ("2", "3")]
    shutil.rmtree(folders[1])
    shutil.copytree(*folders)
    lines = []
    with Checkpoints(tmp_path, 2) as checkpoints:
        state = checkpoints.restore(make_state(), lines.append)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(2))
    reason = "its arrays differ from what was saved"
    assert lines == [f"checkpoint 3 is damaged ({reason}): resuming from 2"]


def test_nothing_is_moved_if_no_checkpoint_is_intact(tmp_path):
    save(tmp_path, [1, 2])
    for step in (1, 2):
        spoil(tmp_path, step)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(Damaged, match="/2: cannot be rest"):
        checkpoints.restore(make_state())
    assert not (tmp_path / DAMAGED_FOLDER).exists()


def test_a_changed_bit_changes_the_sums():
    tree = {
        "a": np.ones((3, 4), np.float32),
        "b": np.arange(3, dtype=np.int32),
        "c": np.array([7], np.uint8),
    }
    sums = sum_bits(tree)
    assert sums == [0x3F800000 * 12 % 2**32, 3, 7]
    tree["a"][1, 2] = np.nextafter(np.float32(1), np.float32(2))
    assert sum_bits(tree) != sums


def test_a_partly_written_checkpoint_is_not_listed(tmp_path):
    save(tmp_path, [1])
    half = tmp_path / FOLDER / "2.orbax-checkpoint-tmp-7"
    (half / "state").mkdir(parents=True)
    (half / "state" / "d").write_bytes(b"half")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
        checkpoints.save(2, make_state(2))
    assert load_variables(tmp_path)["params"]["scale"] == 2


def test_a_checkpoint_is_restored_onto_other_devices(tmp_path):
    two = make_mesh(jax.devices()[:2])
    state = jax.device_put(make_state(3), shard_arrays(make_state(), two, "data"))
    assert not state["params"]["kernel"].is_fully_replicated
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    one = replicate(make_state(), make_mesh(jax.devices()[:1]))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(one)
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(3))
    assert restored["params"]["kernel"].sharding.device_set == {jax.devices()[0]}


def test_a_damaged_score_is_one_line(tmp_path):
    save(tmp_path, [1], scores={1: 0.5})
    (tmp_path / FOLDER / "1" / "metrics" / "metrics").write_bytes(b"{")
    with pytest.raises(UserError, match=f"{FOLDER}: damaged .*: remove the folder 'metrics'"):
        load_variables(tmp_path, "latest")
    shutil.rmtree(tmp_path / FOLDER / "1" / "metrics")
    assert load_variables(tmp_path, "latest")["params"]["scale"] == 1
