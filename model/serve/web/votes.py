"""Votes for and against answers, one JSON object a line. No image; no text unless conversations are logged."""

from __future__ import annotations

import json
import logging
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model.errors import MedPLIBError
from model.serve.web.state import Exchange

_log = logging.getLogger(__name__)


class VoteLog:
    """A file that votes are appended to; safe to use from many threads and processes.

    Args:
        path: the file, made at the first vote and readable by its owner alone; None keeps none.
        log_conversations: write question and answer too.

    Raises:
        MedPLIBError: the file cannot be there.
    """

    def __init__(self, path: Path | None, log_conversations: bool = False) -> None:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise MedPLIBError(f"{path} cannot hold the votes; give a file in a folder that exists with --votes-file")
        self.path, self.log_conversations = path, log_conversations
        self._lock = threading.Lock()

    def write(self, exchange: Exchange) -> None:
        """Append the exchange's vote as it is now; a full disk is logged and does not disturb the visitor."""
        if self.path is None:
            return
        entry: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "vote": {1: "up", -1: "down"}.get(exchange.vote, "withdrawn"),
            "model": exchange.model,
            "finish": exchange.finish,
            "seconds": round(exchange.seconds, 2),
            "regions": len(exchange.marks),
            "masks": len(exchange.masks),
        }
        if self.log_conversations:
            entry |= {"question": exchange.question, "answer": exchange.answer}
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        try:
            with self._lock:
                number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                with os.fdopen(number, "w", encoding="utf-8") as stream:
                    stream.write(line)
        except OSError as error:
            _log.warning("a vote could not be written to %s: %s", self.path, error.strerror or error)
