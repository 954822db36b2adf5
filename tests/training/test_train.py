"""Training end to end: the real experiment shrunk, resuming, devices, and what goes wrong."""

import itertools
import json

import jax
import numpy as np
import pytest
import shrunk
from PIL import Image

from zegformer_jax.cli import demo_stages
from zegformer_jax.evaluation.metrics.segment_fit import IOU
from zegformer_jax.experiment import Experiment
from zegformer_jax.experiment.workdir import CONFIG_FILE, load_variables
from zegformer_jax.input.openmoji import pairs
from zegformer_jax.input.openmoji.rasters import load_pictures
from zegformer_jax.runtime import checkpoints
from zegformer_jax.runtime.mesh import make_mesh, replicate, shard_arrays, to_devices
from zegformer_jax.text.vocabulary import load_vocabulary
from zegformer_jax.training import loop as train
from zegformer_jax.training.initialise import hand_over, start_from
from zegformer_jax.training.log import read_metrics
from zegformer_jax.training.objectives import OBJECTIVES, open_objective
from zegformer_jax.training.optim import make_optimiser
from zegformer_jax.training.step import make_state, make_train_step

pytestmark = pytest.mark.slow


def test_the_demo_leaves_a_whole_report(finished):
    content = json.loads((finished.workdir / "report.json").read_text())
    methods = {(row["name"], row["vocabulary"]) for row in content["scores"]}
    vocabularies = ("pascal_voc_20", "openmoji_voc")
    assert methods == set(itertools.product(demo_stages.METHOD_NAMES.values(), vocabularies))
    assert list(content["vocabularies"]) == list(vocabularies)
    classes = {"pascal_voc_20": 20, "openmoji_voc": 236}
    for row in content["scores"]:
        assert 0 <= row["pixels"] <= 1 and 0 <= row["seen"] <= 1
        assert len(row["class_iou"]) == classes[row["vocabulary"]]
    fits = [row for row in content["metrics"] if row["name"] == IOU]
    assert [row["vocabulary"] for row in fits] == list(vocabularies)
    table = (finished.workdir / "report.md").read_text()
    for name in demo_stages.METHOD_NAMES.values():
        assert f"| {name} " in table
    for picture in ("scenes.png", "losses.png"):
        assert picture in table
        with Image.open(finished.workdir / picture) as image:
            assert min(image.size) > 100
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_every_stage_is_announced(finished):
    assert [line[:5] for line in finished.lines] == ["[1/5]", "[2/5]", "[3/5]", "[4/5]", "[5/5]"]
    assert all("min left" in line for line in finished.lines)


def test_the_metrics_have_a_line_a_step(finished):
    for kind, folder in demo_stages.FOLDERS.items():
        history = read_metrics(finished.workdir / folder)
        assert [line["step"] for line in history] == list(range(1, shrunk.STEPS[kind] + 1))
        assert all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in history)


def test_running_again_trains_nothing_and_gives_the_same_scores(finished, monkeypatch):
    def no_batches(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "prefetch", no_batches)
    again = demo_stages.run_stages(shrunk.configs(), finished.workdir, lambda line: None)
    for first, second in zip(finished.report.scores, again.scores, strict=True):
        assert first.name == second.name
        scores = [list(row.class_iou.values()) for row in (first, second)]
        np.testing.assert_array_equal(*scores)
    assert finished.report.metrics == again.metrics
    assert finished.report.losses == again.losses


def open_run(config, workdir):
    experiment = Experiment.open(config, workdir)
    return experiment, open_objective(experiment)


def first_variables(config, workdir):
    experiment, objective = open_run(config, workdir)
    return start_from(experiment, jax.jit(objective.init)(jax.random.key(0)))


def train_quietly(config, workdir):
    return train.train(Experiment.open(config, workdir), progress=False)


def test_the_grouper_starts_from_the_baselines_backbone(finished):
    params = first_variables(shrunk.beside(finished.workdir), finished.workdir)["params"]
    start = load_variables(finished.workdir / "per_pixel")["params"]
    for part in ("backbone", "pixel_decoder"):
        jax.tree.map(np.testing.assert_array_equal, params[part], start[part])


def test_the_baseline_starts_from_the_classifiers_backbone(finished):
    config = shrunk.beside(finished.workdir, "per_pixel")
    start = load_variables(finished.workdir / "classifier")["params"]
    params = first_variables(config, finished.workdir)["params"]
    jax.tree.map(np.testing.assert_array_equal, params["backbone"], start["backbone"])


def test_the_classifier_learns_seen_classes_by_their_places(finished, monkeypatch):
    drawn = []
    make_batches = pairs.contrastive_batches

    def watched(*arguments, **options):
        for batch in make_batches(*arguments, **options):
            drawn.append(batch["caption"])
            yield batch

    monkeypatch.setattr(pairs, "contrastive_batches", watched)
    config = shrunk.beside(finished.workdir, "classifier", steps=5)
    _, objective = open_run(config, finished.workdir)
    vocabulary = load_vocabulary("openmoji_voc")
    seen = vocabulary.select(vocabulary.seen_indices)
    pictures = load_pictures(finished.workdir / "records")
    titles = set(zip(pictures.titles, pictures.picture_class.tolist(), strict=True))
    assert len(objective.constants["text_cd"]) == len(seen)
    for batch in objective.batches(0):
        for name, place in zip(drawn[-1], batch["picture_class"], strict=True):
            full_place = vocabulary.names.index(seen.names[place])
            assert name in seen.synonyms(place) or (name, full_place) in titles


def test_a_start_of_other_sizes_is_refused(finished):
    config = shrunk.beside(finished.workdir)
    config.model.pixel_decoder.width = 24
    with pytest.raises(ValueError, match=r"per_pixel: its params/pixel_decoder/.*sizes under"):
        first_variables(config, finished.workdir)


def test_a_start_without_a_backbone_is_refused():
    start = {"params": {"visual": {"kernel": np.zeros(3)}}}
    new = {"params": {"backbone": {"kernel": np.zeros(3)}}}
    with pytest.raises(ValueError, match="no backbone to start from"):
        hand_over(new, "zegformer", start, "clip")


def test_a_start_hands_over_what_both_models_have():
    """Everything of one kind; between kinds all but the projection to the text embeddings."""

    parts = ("backbone", "transformer", "class_projection", "no_object")

    def model(value):
        return {"params": {part: {"kernel": np.full(3, value)} for part in parts}}

    start = model(1.0)
    del start["params"]["no_object"]
    new = model(0.0)
    del new["params"]["transformer"]

    def handed(start_kind):
        params = hand_over(new, "zegformer", start, start_kind)["params"]
        return {part for part, leaves in params.items() if leaves["kernel"][0] == 1}

    assert handed("zegformer") == {"backbone", "class_projection"}
    assert handed("per_pixel") == {"backbone"}


class Interrupted(Exception):
    pass


def spoil_batches(monkeypatch, kind, change):
    """Multiplies the loss of batch 1, 2, ... by what `change` gives for that number."""
    open_sound = OBJECTIVES[kind]

    class Spoilt:
        def __init__(self, experiment):
            self.sound = open_sound(experiment)

        def __getattr__(self, name):
            return getattr(self.sound, name)

        def batches(self, start_step):
            for number, batch in enumerate(self.sound.batches(start_step), start_step + 1):
                factor = np.full(len(batch["image"]), change(number), np.float32)
                yield batch | {"factor": factor}

        def loss(self, params, constants, batch, totals, key):
            value, metrics = self.sound.loss(params, constants, batch, totals, key)
            value = value * batch["factor"].mean()
            return value, metrics | {"loss": value}

    monkeypatch.setitem(OBJECTIVES, kind, Spoilt)


def test_an_interrupted_training_goes_on_bit_for_bit(finished, tmp_path, monkeypatch, capsys):
    """With dropout, and with segments that are left out at random."""
    config = shrunk.beside(finished.workdir, steps=6, checkpoint_every=3)
    config.model.transformer.dropout = 0.1
    config.loss.max_targets = 2
    stop = [True]

    def interrupt(number):
        if stop and number == 6:
            raise Interrupted
        return 1.0

    spoil_batches(monkeypatch, "zegformer", interrupt)
    with pytest.raises(Interrupted):
        train_quietly(config, tmp_path / "halved")
    assert [x["step"] for x in read_metrics(tmp_path / "halved")] == [1, 2, 3, 4]
    stop.clear()
    halved = train_quietly(config, tmp_path / "halved")
    capsys.readouterr()
    whole = train_quietly(config, tmp_path / "whole")
    assert capsys.readouterr().out.count("loss.max_targets leaves out") == 1
    assert [line["step"] for line in halved] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in halved] == [line["loss"] for line in whole]
    trees = [load_variables(tmp_path / name)["params"] for name in ("halved", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(finished, tmp_path, monkeypatch):
    config = shrunk.beside(finished.workdir, "per_pixel", steps=4, checkpoint_every=2)
    config.unlock().train.most_skipped = 1
    spoil_batches(monkeypatch, "per_pixel", lambda number: np.nan if number == 3 else 1.0)
    message = r"not finite in steps 3 to 3, .*step 3 \(examples train_.*learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        train_quietly(config, tmp_path)
    with checkpoints.Checkpoints(tmp_path) as saved:
        assert saved.latest_step == 2
    params = load_variables(tmp_path)["params"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_workdir_with_another_config_is_refused(finished):
    before = (finished.workdir / CONFIG_FILE).read_bytes()
    config = shrunk.get_config()
    config.optimiser.learning_rate = 0.125
    with pytest.raises(ValueError, match=r"optimiser\.learning_rate was 0\.\d+, is 0\.125"):
        train_quietly(config, finished.workdir)
    assert (finished.workdir / CONFIG_FILE).read_bytes() == before


def losses_on(mesh, config, workdir, batches, axis="", **options):
    """The losses of the steps on some batches, on a mesh."""
    _, objective = open_run(config, workdir)
    optimiser, schedule = make_optimiser(
        learning_rate=1e-3, steps=100, power=0.9, weight_decay=0.0, clip_norm=1.0
    )
    step = jax.jit(make_train_step(objective, optimiser, schedule, mesh, **options))
    state = make_state(first_variables(config, workdir), objective.metrics, optimiser)
    state = jax.device_put(state, shard_arrays(state, mesh, axis))
    constants, key = replicate((objective.constants, jax.random.key(1)), mesh)
    losses = []
    for batch, _ in train.prefetch(iter(batches), mesh):
        state, metrics = step(state, constants, batch, key)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(scope="module")
def fixed_batch(finished):
    config = shrunk.beside(finished.workdir)
    return config, next(open_run(config, finished.workdir)[1].batches(0))


def test_one_device_and_two_give_the_same_losses(finished, fixed_batch):
    config, batch = fixed_batch
    assert jax.device_count() >= 2
    one, two = (
        losses_on(make_mesh(jax.devices()[:count]), config, finished.workdir, [batch] * 3)
        for count in (1, 2)
    )
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_the_loss_falls_on_one_batch(finished, fixed_batch):
    config, batch = fixed_batch
    losses = losses_on(make_mesh(jax.devices()[:2]), config, finished.workdir, [batch] * 12)
    assert losses[-1] < 0.8 * losses[0], losses


def test_a_batch_that_does_not_divide_by_the_devices_says_so():
    with pytest.raises(ValueError, match="a batch of 3 does not divide by 2 devices: change"):
        to_devices({"image": np.zeros((3, 2))}, make_mesh(jax.devices()[:2]))
