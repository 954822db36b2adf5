"""Tiles cover an image, fade into each other, and their scores are blended."""

import jax.numpy as jnp
import numpy as np
import pytest
from semantic_maps import semantic_maps
from slow_but import slow_but

from zegformer_jax.runtime.errors import UserError
from zegformer_jax.segmentation.augmentation import View
from zegformer_jax.segmentation.label_maps import ClassScores
from zegformer_jax.segmentation.tiles import blend_tiles, place_tiles

LENGTHS = [1, 31, 32, 33, 40, 47, 56, 57, 64, 81, 90, 200, 1001]


def tile_weights(side):
    """Returns each tile's weight in each pixel of the side, float [tiles, length]."""
    weights = np.zeros((len(side.starts), side.length))
    for i, cell in enumerate(side.cells):
        own, following = side.weights(i)
        count = cell.stop - cell.start
        assert not own[count:].any() and not following[count:].any()
        weights[i, cell] += own[:count]
        weights[min(i + 1, len(weights) - 1), cell] += following[:count]
    return weights


@pytest.mark.parametrize("tile", [32, 33, 50])
@pytest.mark.parametrize("length", LENGTHS)
def test_tiles_cover_the_side_and_fade_into_each_other(length, tile):
    side = place_tiles(length, tile)
    assert side.starts[0] == 0 and side.starts[-1] + side.tile == length
    assert side.cells[0].start == 0 and side.cells[-1].stop == length
    if length <= tile:
        assert len(side.starts) == 1 and side.tile == length
    weights = tile_weights(side)
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-6)
    pixels = np.arange(length)
    for start, weight in zip(side.starts, weights, strict=True):
        assert not weight[(pixels < start) | (pixels >= start + side.tile)].any()
        assert weight.max() == 1, "every tile has pixels of its own"
    # No seam: neighbouring pixels' weights differ by one step of the fade over a quarter.
    assert np.abs(np.diff(weights, axis=1)).max(initial=0) <= 1.001 / int(tile / 4)


def test_no_tile_too_many():
    """The fewest tiles that overlap by a quarter."""
    for length, count in ((33, 2), (56, 2), (57, 3), (80, 3), (81, 4)):
        assert len(place_tiles(length, 32).starts) == count


def test_a_tile_of_a_few_pixels_is_refused():
    with pytest.raises(UserError, match=r"^eval.tile 31: give at least 32 pixels, or 0"):
        place_tiles(100, 31)


@pytest.mark.parametrize("resize", slow_but(["after"], ["after", "before"]))
@pytest.mark.parametrize(
    "size, rows_at_once",
    slow_but([((20, 60), 3)], [((50, 130), None), ((90, 33), 7), ((20, 60), 3)]),
)
def test_scores_are_blended(size, rows_at_once, resize):
    """The oracle makes each tile's whole map of scores and adds them up by their weights."""
    rng = np.random.default_rng(0)
    rows, columns = (place_tiles(length, 32) for length in size)
    tile = (rows.tile, columns.tile)
    views = [View(None, np.array(tile)), View(None, np.array(tile), mirrored=True)]
    seen = np.array([True, False, True])
    made = {}

    def run(rows, columns):
        logits = rng.normal(size=(2, 4, 8, 8)).astype(np.float32) * 3
        scores = rng.random((2, 1, 4, 3)).astype(np.float32)
        made[rows.start, columns.start] = logits, scores
        return logits, scores

    def maps(outputs, original_size, out_size, **options):
        logits = [x for of_tile, _ in outputs for x in of_tile]
        scores = ClassScores([x for _, of_tile in outputs for x in of_tile], seen, (0.2,))
        (result,) = semantic_maps(
            logits,
            views * len(outputs),
            [scores],
            original_size=original_size,
            out_size=out_size,
            resize=resize,
            **options,
        )
        return result[0, 0]

    cells = []

    def blend(outputs, windows):
        out_size = (rows.longest, columns.longest)
        scores = maps(outputs, tile, out_size, windows=windows, rows_at_once=rows_at_once)
        cells.append(np.asarray(scores))
        return scores.argmax(0)

    labels = blend_tiles(rows, columns, run, blend)
    assert len(made) == len(rows.starts) * len(columns.starts), "each tile is run once"

    wanted = np.zeros((3, *size))
    for i, top in enumerate(rows.starts):
        for j, left in enumerate(columns.starts):
            whole = np.asarray(maps([made[top, left]], jnp.array(tile), tile))
            weight = tile_weights(rows)[i][:, None] * tile_weights(columns)[j]
            part = (slice(top, top + tile[0]), slice(left, left + tile[1]))
            wanted[:, *part] += weight[part] * whole
    places = [(y, x) for y in rows.cells for x in columns.cells]
    for (cell_y, cell_x), found in zip(places, cells, strict=True):
        part = wanted[:, cell_y, cell_x]
        np.testing.assert_allclose(found[:, : part.shape[1], : part.shape[2]], part, atol=2e-5)
    top_two = np.sort(wanted, axis=0)[-2:]
    clear = top_two[1] - top_two[0] > 1e-4
    np.testing.assert_array_equal(labels[clear], wanted.argmax(0)[clear])
    assert clear.mean() > 0.99
