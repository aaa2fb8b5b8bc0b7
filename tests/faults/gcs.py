"""Run by a test: a local server of Google's object store, with one empty bucket in its memory.

``python gcs.py PORT BUCKET``. The package's own command answers one request at a time, so that a client that holds a
download open waits for itself; here each request has a thread, and what is stored a lock.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage


class Locked(Storage):
    """One call at a time."""

    _lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            with Locked._lock:
                return found(*arguments, **named)

        return call


def main(port: str, bucket: str) -> None:
    """Serves until it is killed."""
    store = Locked(use_memory_fs=True)
    create_bucket(bucket, store)
    ThreadingHTTPServer(("127.0.0.1", int(port)), partial(RequestHandler, store)).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
