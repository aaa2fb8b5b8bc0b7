"""Auditing pairs of networks: descriptions ─► units with some words, a review file ─► counts, tests, figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from milan_ray.config import Fingerprint
from milan_ray.engine.stage import Known, Output, Stage, due
from milan_ray.errors import MilanError
from milan_ray.names import checked_name
from milan_ray.progress import say
from milan_ray.report.audits import card_link
from milan_ray.report.figures import store_figure
from milan_ray.schema import AUDITED, AUDITS, DESCRIPTIONS, EXEMPLARS, MANIFEST, SCORES, Table
from milan_ray.schema.audits import REJECT, REVIEW
from milan_ray.schema.table import Column
from milan_ray.scoring.evaluation import Row, score_table
from milan_ray.scoring.search import descriptions_hash, scan_descriptions
from milan_ray.storage import FILE_NAME, Storage
from milan_ray.studies.auditing import statistics as auditing
from milan_ray.studies.auditing.plot import plot_audit
from milan_ray.textfiles import decode_text

KERNEL_VERSION = "audit-1"


@dataclass(frozen=True)
class AuditConfig:
    """Settings of an audit.

    Attributes:
        name: Name of the audit in the tables.
        words: Words, each as in a search (``face|person``), in any form.
        labeler: Whose descriptions.
    """

    name: str = "faces"
    words: tuple[str, ...] = auditing.FACE_WORDS
    labeler: str = "milan"

    def __post_init__(self) -> None:
        checked_name("an audit", self.name, slashes=True)


@dataclass(frozen=True)
class Audit:
    """Result of an audit.

    Attributes:
        pairs: Rows of schema AUDITS.
        units: Rows of schema AUDITED.
        rows: What the sides differ by: rows of :func:`~milan_ray.scoring.evaluation.score_table`.
    """

    pairs: pl.DataFrame
    units: pl.DataFrame
    rows: list[Row]

    @property
    def counted(self) -> pl.DataFrame:
        """The units that nobody rejected."""
        return self.units.filter(pl.col("verdict") != REJECT)


def described_models(storage: Storage, labeler: str) -> list[str]:
    """The networks that a labeler has described."""
    return sorted({keys["model"] for keys in storage.partitions(DESCRIPTIONS, labeler=labeler)})


@dataclass(frozen=True)
class Auditing(Stage):
    """An audit that :func:`find_audit` has counted and :func:`run_audit` writes.

    Attributes:
        name: Name of the audit in the tables.
        audit: Its result.
        fingerprint: What decides that, people's verdicts among it.
        about: Metadata of table AUDITS.
        review: The review file as it should be; None where it is.
        reviewed: Whether there is a review file.
    """

    table = AUDITS

    name: str
    audit: Audit
    fingerprint: Fingerprint
    about: dict[str, str]
    review: str | None
    reviewed: bool

    def outputs(self, known: Known) -> Iterator[Output]:
        """The counts by pair."""
        yield Output({"audit": self.name}, self.fingerprint)

    def why(self, storage: Storage, output: Output) -> str | None:
        """Why it has to be written: a table or the review file is missing or stale."""
        return super().why(storage, output) or (None if self.reviewed else f"{REVIEW} missing")


def run_audit(storage: Storage, pairs: Sequence[auditing.Pair], config: AuditConfig) -> Audit:
    """Counts units by their descriptions in pairs of networks, with what people said of them in the review file.

    The review file, ``review.csv`` next to the table ``audited``, is written with a line per unit found. What people
    write into it stays there: later runs only add lines for units that are new, or that now say something else.

    Args:
        storage: The run directory, which holds descriptions of all networks.
        pairs: Networks trained on images as they are, and their twins.
        config: What to look for.

    Raises:
        MilanError: A network has no descriptions, the networks were dissected on different images, or the review file
            is damaged.
    """
    study = find_audit(storage, pairs, config)
    audit = study.audit
    if study.review is not None:  # else the file stays as people saved it
        storage.put(_review(storage, config.name), study.review.encode())
    for output in due(study, storage):
        keys, experiment = output.keys, f"audit: {config.name}"
        storage.write(AUDITED, AUDITED.table(_columns(audit.units, AUDITED.columns)), study.fingerprint, **keys)
        storage.write(SCORES, score_table(experiment, audit.rows), study.fingerprint, experiment=experiment)
        store_figure(storage, AUDITS, plot_audit(audit.pairs, config.words), **keys)
        table = AUDITS.table(_columns(audit.pairs, AUDITS.columns), study.about)
        storage.write(AUDITS, table, study.fingerprint, **keys)  # last: it says that all is done
    return audit


def find_audit(storage: Storage, pairs: Sequence[auditing.Pair], config: AuditConfig) -> Auditing:
    """Counts as :func:`run_audit` does, whose arguments and errors these are, and writes nothing."""
    models = list(dict.fromkeys(name for pair in pairs for name in pair))
    known = described_models(storage, config.labeler)
    if absent := [name for name in models if name not in known]:
        raise MilanError(
            f"{storage.root} holds no descriptions of {', '.join(absent)} by {config.labeler}; run jobs.describe, or "
            "give this job a --decoder and a --probe."
        )
    images = _images(storage, models, config.labeler)
    frame = scan_descriptions(storage, models, None, [config.labeler])
    every = frame.select("model", "layer", "unit", "description").collect().sort("model", "layer", "unit")
    sizes = {name: int((every["model"] == name).sum()) for name in models}
    for model, other in pairs:
        if sizes[model] != sizes[other]:
            say(f"audit: {model} has {sizes[model]} described units, {other} {sizes[other]}: compare the shares")
    found = auditing.find_units(every, config.words)
    found = found.with_columns(
        _exemplars(storage, found),
        pl.Series("card", [card_link(*row) for row in found.select("model", "layer", "unit").iter_rows()], pl.String),
    )
    place = _review(storage, config.name)
    try:
        text = decode_text(storage.get(place)) if storage.exists(place) else None
    except UnicodeDecodeError as error:
        raise MilanError(f"{storage.uri(place)} is not UTF-8 ({error}): save it as a CSV file in UTF-8.") from error
    earlier = None if text is None else auditing.read_review(text, storage.uri(place))
    units, new = auditing.reviewed(found, earlier)
    counts = auditing.count_pairs(pairs, units, sizes)
    rows = auditing.compare_sides(counts)
    described = descriptions_hash(storage, config.labeler, models)
    name = pl.lit(config.name).alias("audit")
    audited = _frame(AUDITED, units.with_columns(name))
    fingerprint = Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "audit": config,
            "pairs": [list(pair) for pair in pairs],
            "descriptions": described,
            "units and verdicts": audited.rows(),
            "images": images,
        }
    )
    return Auditing(
        config.name,
        Audit(_frame(AUDITS, counts.with_columns(name, pl.lit(images).alias("images"))), audited, rows),
        fingerprint,
        {"labeler": config.labeler, "words": ", ".join(config.words), "descriptions": described},
        auditing.write_review(new, text) if text is None or len(new) else None,
        text is not None,
    )


def review_path(storage: Storage, name: str) -> str:
    """Where the review file lies."""
    return storage.uri(_review(storage, name))


def _review(storage: Storage, name: str) -> str:
    return storage.path(AUDITED, audit=name).replace(FILE_NAME, REVIEW)


def _frame(table: Table, frame: pl.DataFrame) -> pl.DataFrame:
    """Rows as they are when read back."""
    return pl.DataFrame(pl.from_arrow(table.table(_columns(frame, table.columns))))


def _columns(frame: pl.DataFrame, columns: Sequence[Column]) -> dict[str, object]:
    return {column.name: frame[column.name].to_list() for column in columns}


def _exemplars(storage: Storage, found: pl.DataFrame) -> pl.Expr:
    """The hash of the exemplars of each layer, shortened; empty where there are none."""
    layers = found.select("model", "layer").unique().rows()
    of = {
        f"{model}\n{layer}": storage.config_of(EXEMPLARS, model=model, layer=layer)[:12]
        if storage.exists(storage.path(EXEMPLARS, model=model, layer=layer))
        else ""
        for model, layer in layers
    }
    key = pl.concat_str("model", "layer", separator="\n")
    return key.replace_strict(list(of), list(of.values()), return_dtype=pl.String).alias("exemplars")


def _images(storage: Storage, models: Sequence[str], labeler: str) -> str:
    """The roots of the one probe that all networks were dissected on.

    Raises:
        MilanError: There are several.
    """
    probes: dict[str, str] = {}
    for keys in storage.partitions(DESCRIPTIONS, labeler=labeler):
        if keys["model"] in models:
            meta = storage.metadata(EXEMPLARS, model=keys["model"], layer=keys["layer"])
            if meta is not None:
                probes.setdefault(meta["probe"], keys["model"])
    if len(probes) > 1:
        first, second = list(probes.values())[:2]
        raise MilanError(
            f"{first} and {second} were dissected on different images: an audit compares exemplars from the same, "
            "unblurred ones; describe both on the same --probe."
        )
    roots: list[str] = []
    for probe in probes:
        if storage.count(MANIFEST, probe=probe):
            roots = sorted(set(storage.read(MANIFEST, ["root"], probe=probe)["root"].to_pylist()))
    return ", ".join(roots)
