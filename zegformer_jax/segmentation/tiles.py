"""Large images as overlapping tiles: each is segmented alone, and their scores are blended.

Along each side of the image, tiles of one length start at even distances. Where two neighbours
overlap, one fades into the other over `FADE` of a tile in the middle of their overlap, so a pixel
has the scores of one tile, of two, or of four at a corner. The image is cut into cells, one for
each tile: the cell of a tile ends where the next tile has faded in.

Besides the image and its label map, memory holds the outputs of two rows of tiles.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from zegformer_jax.runtime.errors import UserError

FADE = 1 / 4  # of a tile's side, over which a tile fades into the next; tiles overlap at least so
MIN_SIDE = 32  # pixels of a tile


class Window(NamedTuple):
    """Part of a tile that goes into a cell.

    Attributes:
        start: int [2], row and column of the cell's first pixel in the tile; the weights of pixels
            outside the tile are 0.
        weights_y: Weight of the tile in each row of the cell, float32 [y].
        weights_x: Weight of the tile in each column of the cell, float32 [x].
    """

    start: np.ndarray
    weights_y: np.ndarray
    weights_x: np.ndarray


@dataclass(frozen=True)
class Side:
    """Tiles and cells along one side of an image.

    Attributes:
        length: Pixels of the image's side.
        tile: Pixels of a tile's side.
        starts: First pixel of each tile.
        ends: End of each tile's cell, behind the fade into the next tile.
    """

    length: int
    tile: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def cells(self) -> tuple[slice, ...]:
        """The pixels of each cell."""
        return tuple(map(slice, (0, *self.ends[:-1]), self.ends))

    @property
    def longest(self) -> int:
        """Pixels of the longest cell."""
        return max(cell.stop - cell.start for cell in self.cells)

    def weights(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the weights of a cell's own tile and of the next in it, which sum to 1.

        Args:
            index: The cell's number.

        Returns:
            Two float32 [longest], zero beyond the cell's end.
        """
        cell = self.cells[index]
        pixels = np.arange(cell.stop - cell.start)
        if index + 1 == len(self.ends):
            following = np.zeros(len(pixels))
        else:
            fade = _fade(self.tile)
            following = np.clip((pixels - (len(pixels) - fade) + 0.5) / fade, 0, 1)
        pad = (0, self.longest - len(pixels))
        both = (np.pad(1 - following, pad), np.pad(following, pad))
        return tuple(weights.astype(np.float32) for weights in both)


def place_tiles(length: int, tile: int) -> Side:
    """Places tiles along one side of an image.

    Args:
        length: Pixels of the image's side, at least 1.
        tile: Pixels of a tile's side; a shorter image has one tile, of its length.

    Raises:
        UserError: Tiles are smaller than `MIN_SIDE`.
    """
    if tile < MIN_SIDE:
        raise UserError(f"eval.tile {tile}: give at least {MIN_SIDE} pixels, or 0 for whole images")
    if length <= tile:
        return Side(length, length, (0,), (length,))
    fade = _fade(tile)
    count = 1 + -(-(length - tile) // (tile - fade))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    middles = [(start + following + tile) // 2 for start, following in itertools.pairwise(starts)]
    return Side(length, tile, tuple(starts), (*[m + fade // 2 for m in middles], length))


def _fade(tile: int) -> int:
    return int(tile * FADE)


def blend_tiles(
    rows: Side,
    columns: Side,
    run: Callable[[slice, slice], Any],
    blend: Callable[[list[Any], list[Window]], np.ndarray],
) -> np.ndarray:
    """Segments an image tile by tile.

    Args:
        rows: Tiles along the image's height.
        columns: Tiles along its width.
        run: Returns the model's outputs for a tile, given its rows and its columns in the image.
        blend: Returns the label map of a cell, int32 [y, x] of the longest cell's sides, from the
            outputs of four tiles and their windows.

    Returns:
        int32 [H, W].
    """
    labels_hw = np.empty((rows.length, columns.length), np.int32)

    def run_row(index: int) -> list[Any]:
        top = rows.starts[index]
        return [
            run(slice(top, top + rows.tile), slice(left, left + columns.tile))
            for left in columns.starts
        ]

    upper = run_row(0)
    for i, cell_y in enumerate(rows.cells):
        below = min(i + 1, len(rows.starts) - 1)
        lower = run_row(below) if below > i else upper
        for j, cell_x in enumerate(columns.cells):
            right = min(j + 1, len(columns.starts) - 1)
            outputs = [upper[j], upper[right], lower[j], lower[right]]
            windows = [
                Window(
                    np.array((cell_y.start - rows.starts[y], cell_x.start - columns.starts[x])),
                    weights_y,
                    weights_x,
                )
                for y, weights_y in zip((i, below), rows.weights(i), strict=True)
                for x, weights_x in zip((j, right), columns.weights(j), strict=True)
            ]
            height, width = cell_y.stop - cell_y.start, cell_x.stop - cell_x.start
            labels_hw[cell_y, cell_x] = np.asarray(blend(outputs, windows))[:height, :width]
        upper = lower
    return labels_hw
