"""The one error that headstart raises at its boundaries: what, where, and what to do.

Goes in: words for a person, and optionally a table. Comes out: at most one screen of
text without anything that a terminal obeys, or JSON, so that a stage's error survives
the process that raised it. Never a stack trace: an unexpected exception stays what it is and keeps its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

MAX_TABLE_LINES = 60
# Names and labels are anyone's: controls but tab and newline, what turns text around, lone surrogates.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass
class HeadstartError(Exception):
    """Something the user can mend.

    Args:
        what: one sentence naming what is wrong.
        where: file, row, key or address.
        do: the next step to take.
        table: lines of a ready-made table, shown between ``where`` and ``do``;
            at most ``MAX_TABLE_LINES`` are printed.
        transient: the same call may succeed later, as when the network is down.
    """

    what: str
    where: str = ""
    do: str = ""
    table: Sequence[str] = field(default_factory=tuple)
    transient: bool = False

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            # Of a name with line breaks as one line, or it would pass for more of them.
            lines.append(f"  where: {self.where}".replace("\n", r"\n"))
        shown = list(self.table[:MAX_TABLE_LINES])
        lines += [f"  {line}" for line in shown]
        if len(self.table) > len(shown):
            lines.append(f"  ... and {len(self.table) - len(shown)} more lines")
        if self.do:
            lines.append(f"  do:    {self.do}")
        return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), "\n".join(lines))

    def __reduce__(self) -> tuple[type[HeadstartError], tuple[object, ...]]:
        return (type(self), (self.what, self.where, self.do, tuple(self.table), self.transient))

    def to_dict(self) -> dict[str, object]:
        """The error as JSON-ready values; ``HeadstartError(**d)`` is the way back."""
        return asdict(self) | {"table": list(self.table)}


def unmade(what: str, error: FileNotFoundError, recipe: str, stage: str) -> HeadstartError:
    """The error for a file that a stage of this recipe has not written yet.

    pandas leaves the path in the message alone. A recipe that nobody has ingested is not known to DVC.
    """
    return HeadstartError(
        what,
        where=str(error.filename or error),
        do=f"run `headstart ingest recipes/{recipe}.yaml`, then `dvc repro {stage}@{recipe}`",
    )
