"""Logs of flows: an error that speaks for itself is told in its own words, whichever flow it ends."""

from __future__ import annotations

import logging

from headstart.errors import HeadstartError


class InWords(logging.Filter):
    """An error that speaks for itself is logged without its stack; any other keeps it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        if record.exc_info and isinstance(record.exc_info[1], HeadstartError):
            record.exc_info = None
        return True


def in_words() -> None:
    """Let Prefect's own reports of failed flows and tasks pass through the filter."""
    for speaker in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(speaker)
        if not any(isinstance(known, InWords) for known in logger.filters):
            logger.addFilter(InWords())
