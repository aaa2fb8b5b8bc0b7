"""Opens object stores by URI, with credentials from the environment alone."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from milan_ray.errors import MilanError, reason

_BUCKETS = ("s3", "gs", "gcs")

_ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
}
"""Scheme → environment variables of its credentials, for messages."""


def is_uri(root: object) -> bool:
    """Whether a root is a URI rather than a local path."""
    return "://" in str(root)


def split_query(uri: str) -> tuple[str, str]:
    """Splits a URI into the part before the query, without trailing slashes, and the query with its question mark."""
    place, mark, query = uri.partition("?")
    return place.rstrip("/"), mark + query


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the path in it; nothing is read yet.

    Args:
        uri: ``s3://bucket/folder``, ``gs://bucket/folder`` or another URI that pyarrow knows, with options as query.

    Raises:
        MilanError: The scheme is unknown, the URI names no bucket, or it carries credentials.
    """
    place, query = split_query(uri)
    try:
        parts = urlsplit(place)
    except ValueError as error:
        raise MilanError(
            f"cannot open {place} ({error}): give a folder, or a URI such as s3://bucket/folder."
        ) from error
    if "@" in parts.netloc and parts.username != "anonymous":
        # The message leaves out what stands before the @, which would end up in logs.
        raise MilanError(
            f"the {parts.scheme}:// URI of {parts.netloc.rpartition('@')[2]} carries credentials: leave them out, and "
            f"set them in the environment ({_ENVIRONMENT.get(parts.scheme, 'as the store documents')})."
        )
    if parts.scheme in _BUCKETS and not parts.netloc:
        raise MilanError(f"{uri} names no bucket: give {parts.scheme}://bucket/folder.")
    if parts.scheme == "s3" and "allow_delayed_open" not in query:
        # A file that fits into one part is then one PUT of a finished buffer instead of three requests.
        query += ("&" if query else "?") + "allow_delayed_open=true"
    try:
        return fs.FileSystem.from_uri(place + query)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise MilanError(
            f"cannot open {place} ({reason(error)}): give a folder, or a URI such as s3://bucket/folder."
        ) from error


def why(error: BaseException, uri: str) -> str:
    """The end of an error message: what the object store or file system reports, and the remedy."""
    message = getattr(error, "strerror", None) or reason(error)
    environment = _ENVIRONMENT.get(uri.partition(":")[0])
    if environment is None:
        return f"{message}; see that it may be read and written."
    if re.search("NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist", message):
        return "there is no such bucket; make it first, or choose another."
    return f"{message}; see that the bucket is there and that the environment may use it ({environment})."
