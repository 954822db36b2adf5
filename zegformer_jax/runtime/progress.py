"""Long runs on the screen: what they are at, their speed and the time left, in 100 columns."""

import shutil
import sys
import textwrap
import time
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

COLUMNS = 100
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s{postfix}"


def announce(lines: Iterable[str], file: TextIO | None = None) -> None:
    """Prints lines, broken at spaces if they are long; None prints to standard error."""
    for line in lines:
        text = textwrap.fill(
            line, COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        tqdm.write(text, file=file or sys.stderr)


class Progress:
    """A bar with the images per second and the time left.

    Only what `start` and `update` enclose is timed: neither compilation nor validation.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int = 0,
        images: int = 0,
        shown: bool = True,
    ):
        """Makes the bar; a context closes it.

        Args:
            title: What is done.
            total: Number of steps, or of images.
            done: Number of them that are done already.
            images: Images of a step; 0 if images are counted.
            shown: False shows nothing.
        """
        columns = shutil.get_terminal_size((COLUMNS, 0)).columns
        self._bar = tqdm(
            total=total, initial=done, desc=title, unit="step" if images else "image",
            bar_format=BAR, disable=not shown, ncols=min(columns, COLUMNS), mininterval=1.0,
        )  # fmt: skip
        self._images, self._note = images or 1, ""
        self._left, self._timed, self._seconds = total - done, 0, 0.0
        self._since: float | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        """Leaves the bar on the screen."""
        self._bar.close()

    def start(self) -> None:
        """Starts the clock, or restarts it after something that is not timed."""
        self._since = time.perf_counter()

    def note(self, text: str) -> None:
        """Shows a text beside the bar, at once, in place of the one before."""
        if text != self._note:
            self._note = text
            self._bar.set_postfix_str(self._text())

    def update(self, count: int = 1, timed: bool = True) -> None:
        """Counts steps or images that were done since the last update, or since `start`."""
        now = time.perf_counter()
        if timed and self._since is not None:
            self._timed, self._seconds = self._timed + count, self._seconds + now - self._since
        self._since, self._left = now, self._left - count
        self._bar.set_postfix_str(self._text(), refresh=False)
        self._bar.update(count)

    def _text(self) -> str:
        if not self._timed:
            return self._note
        seconds = self._seconds / self._timed
        speed = f"{self._images / max(seconds, 1e-9):.1f} images/s"
        left = f"{tqdm.format_interval(seconds * self._left)} left"
        return ", ".join(filter(None, (self._note, speed, left)))
