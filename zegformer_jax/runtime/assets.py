"""Files that come with the code: vocabularies, prompts, splits and configs."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel holds `data/` and `configs/` inside the package; a checkout has them beside it.
ROOT = _PACKAGE / "assets" if (_PACKAGE / "assets").is_dir() else _PACKAGE.parent
DATA = ROOT / "data"
