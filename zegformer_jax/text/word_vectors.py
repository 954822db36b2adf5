"""Word vectors, which replace CLIP's text embeddings as in SPNet and ZS3Net."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zegformer_jax.runtime.errors import MissingFile, UserError, reading


def load_word_vectors(path: str | Path, names: Sequence[str]) -> np.ndarray:
    """Reads the vectors of some classes from a NumPy file.

    The file is an `.npz` with `names`, K strings, and `vectors`, float [K, D], one row per name,
    such as fastText and word2vec joined, D = 600. The vector of a class is that of its whole name
    ("sofa, couch") if the file has it, else the mean of its synonyms' normalised vectors.

    Args:
        path: The file.
        names: C class names; commas separate synonyms.

    Returns:
        float32 [C, D], rows of length 1.

    Raises:
        MissingFile: There is no such file.
        UserError: The file has another layout, or lacks a class, which the message names.
    """
    rows = _read(Path(path))
    vectors = []
    for name in names:
        wanted = [name] if name in rows else [word.strip() for word in name.split(",")]
        if missing := [word for word in wanted if word not in rows]:
            raise UserError(f"{path}: no vector for '{missing[0]}' (class '{name}')")
        vectors.append(_unit(np.mean([_unit(rows[word], path) for word in wanted], axis=0), path))
    return np.stack(vectors).astype(np.float32)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise MissingFile(f"{path}: no such file (model.word_vectors)")
    layout = "needs an .npz with 'names' [K] of strings and 'vectors' float [K, D]"
    with (
        reading(path, layout),
        np.errstate(all="ignore"),
        np.load(path, allow_pickle=False) as file,
    ):
        # An entry that is no array is bytes.
        names, vectors = (np.asarray(file[name]) for name in ("names", "vectors"))
    fits = names.ndim == 1 and vectors.ndim == 2 and len(names) == len(vectors)
    if not fits or vectors.dtype.kind not in "biuf" or names.dtype.kind != "U":
        found = f"names {list(names.shape)}, vectors {list(vectors.shape)} of {vectors.dtype}"
        raise UserError(f"{path}: {layout}, not {found}")
    with np.errstate(invalid="ignore"):  # NaNs, which `_unit` refuses
        return dict(zip(map(str, names), vectors.astype(np.float64), strict=True))


def _unit(vector: np.ndarray, path: str | Path) -> np.ndarray:
    length = np.linalg.norm(vector)
    if not np.isfinite(length) or length == 0:
        raise UserError(f"{path}: a vector has no direction: its length is {length}")
    return vector / length
