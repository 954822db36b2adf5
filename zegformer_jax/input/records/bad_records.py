"""Bad records of a data set as the lines of a message, one for each kind of error."""

import re
from collections.abc import Callable, Collection, Sequence

from zegformer_jax.input.records.shard import BadRecord
from zegformer_jax.input.unknown import Value, count_values, name_value
from zegformer_jax.runtime.errors import UserError

# Parts of a reason that differ from record to record: names of files, and numbers.
PARTICULAR = re.compile(r"\S+\.(?:png|jpe?g|json)|\d+", re.IGNORECASE)
Advise = Callable[[Collection[Value]], str]


class BadRecords(UserError):
    """Records that cannot be used.

    Attributes:
        records: All bad records, in the data set's order.
        lines: One line for each kind of error, as `summarise` returns them.
    """

    def __init__(
        self, records: Sequence[BadRecord], lines: Sequence[str], list_file: str, can_skip: bool
    ):
        """Describes the records.

        Args:
            records: All bad records.
            lines: The lines of `summarise`.
            list_file: Path of the file that lists all of them.
            can_skip: True if good records are left in every split.
        """
        self.records, self.lines = tuple(records), tuple(lines)
        skip = ", or leave them out with --skip-bad" if can_skip else ""
        super().__init__(
            f"{len(records)} bad records, listed in {list_file}: repair them and run the same "
            f"command again{skip}"
        )


def summarise(records: Sequence[BadRecord], total: int, advise: Advise) -> list[str]:
    """Returns a line for each kind of error, in the order of their first records.

    Args:
        records: Bad records.
        total: Number of records of the data set, good or bad.
        advise: Returns what to do about unknown values of labels.
    """
    kinds: dict[str, list[BadRecord]] = {}
    for record in records:
        kinds.setdefault(_kind(record), []).append(record)
    return [_line(group, total, advise) for group in kinds.values()]


def _kind(record: BadRecord) -> str:
    return "" if record.unknown else PARTICULAR.sub("", record.reason)


def _line(group: Sequence[BadRecord], total: int, advise: Advise) -> str:
    if len(group) == 1:
        return str(group[0])
    if not group[0].unknown:
        return f"{group[0]} (and {len(group) - 1} more of this kind)"
    values = {name_value(value): value for record in group for value in record.unknown}
    counts = count_values([record.unknown for record in group], total)
    return "; ".join(text for text in (counts, advise(values.values())) if text)
