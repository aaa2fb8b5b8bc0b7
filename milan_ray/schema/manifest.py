"""The probe manifest: the images of a probe."""

import pyarrow as pa

from milan_ray.schema.table import Column, Table

MANIFEST = Table(
    "manifest",
    ("probe",),
    (
        Column("image_id", pa.int64(), "row number in the probe: the image's id everywhere else"),
        Column("root", pa.string(), "the root the image was found under (absolute path, URI or world:…)"),
        Column("path", pa.string(), "path below the root"),
        Column("size", pa.int64(), "bytes of the file; null for images that are not files", True),
        Column("mtime_ns", pa.int64(), "modification time in ns since the epoch; null without one", True),
        Column("etag", pa.string(), "the object store's or generator's version tag; null without one", True),
        Column("class_label", pa.string(), "name of the image's class; null without one", True),
        Column("sha256", pa.string(), "hex digest of the bytes, recorded when first read; null before", True),
    ),
    "One probe image.",
)
