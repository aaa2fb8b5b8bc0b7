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
from milan_ray.schema import AUDITED, AUDITS, DESCRIPTIONS, EXEMPLARS, MANIFEST, SCORES
from milan_ray.schema.audits import REJECT, REVIEW
from milan_ray.scoring.comparable import comparable
from milan_ray.scoring.evaluation import Row, score_table
from milan_ray.scoring.search import descriptions_hash, scan_descriptions
from milan_ray.scoring.supported import only_supported
from milan_ray.storage import FILE_NAME, Storage
from milan_ray.studies.auditing import statistics as auditing
from milan_ray.studies.auditing.plot import plot_audit
from milan_ray.studies.tables import frame_of, settings, supported_inputs, table_of, write_frame
from milan_ray.textfiles import decode_text

KERNEL_VERSION = "audit-1"


@dataclass(frozen=True)
class AuditConfig:
    """Settings of an audit.

    Attributes:
        name: Name of the audit in the tables.
        words: Words, each as in a search (``face|person``), in any form.
        labeler: Labeler whose descriptions are read.
        supported_by: Judge whose verdicts decide which descriptions are read: supported ones; None reads all.
    """

    name: str = "faces"
    words: tuple[str, ...] = auditing.FACE_WORDS
    labeler: str = "milan"
    supported_by: str | None = None

    def __post_init__(self) -> None:
        checked_name("an audit", self.name, slashes=True)


@dataclass(frozen=True)
class Audit:
    """Result of an audit.

    Attributes:
        pairs: Rows of schema AUDITS.
        units: Rows of schema AUDITED.
        rows: Differences of the sides: rows of :func:`~milan_ray.scoring.evaluation.score_table`.
    """

    pairs: pl.DataFrame
    units: pl.DataFrame
    rows: list[Row]

    @property
    def counted(self) -> pl.DataFrame:
        """The units without a rejection."""
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
        fingerprint: Fingerprint of everything that decides the result, including people's verdicts.
        about: Metadata of table AUDITS.
        review: New text of the review file; None if the file is up to date.
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
    """Counts units by their descriptions in pairs of networks, with people's verdicts in the review file.

    The review file, ``review.csv`` next to the table ``audited``, is written with a line per unit found. Later runs
    keep what people write into it and only add lines for units that are new or whose descriptions changed.

    Args:
        storage: The run directory, which holds descriptions of all networks.
        pairs: Networks trained on images as they are, and their twins.
        config: Settings.

    Raises:
        MilanError: A network has no descriptions, the networks were dissected on different images, or the review file
            is damaged.
    """
    study = find_audit(storage, pairs, config)
    audit, fingerprint = study.audit, study.fingerprint
    if study.review is not None:  # otherwise the file stays as people saved it
        storage.put(_review(storage, config.name), study.review.encode())
    for output in due(study, storage):
        experiment = f"audit: {config.name}"
        write_frame(storage, AUDITED, audit.units, fingerprint, **output.keys)
        storage.write(SCORES, score_table(experiment, audit.rows), fingerprint, experiment=experiment)
        store_figure(storage, AUDITS, plot_audit(audit.pairs, config.words), **output.keys)
        # The table is written last: it marks the audit as complete.
        storage.write(AUDITS, table_of(AUDITS, audit.pairs, study.about), fingerprint, **output.keys)
    return audit


def find_audit(storage: Storage, pairs: Sequence[auditing.Pair], config: AuditConfig) -> Auditing:
    """Counts like :func:`run_audit`, whose arguments and errors these are, but writes nothing."""
    models = list(dict.fromkeys(name for pair in pairs for name in pair))
    known = described_models(storage, config.labeler)
    if absent := [name for name in models if name not in known]:
        raise MilanError(
            f"{storage.root} holds no descriptions of {', '.join(absent)} by {config.labeler}; run jobs.describe, or "
            "give this job a --decoder and a --probe."
        )
    images = _images(storage, models, config.labeler)
    descriptions = scan_descriptions(storage, models, None, [config.labeler])
    every = descriptions.select("model", "layer", "unit", "description").collect().sort("model", "layer", "unit")
    every = comparable(every, models, "audit")
    if config.supported_by is not None:
        of_model = (every.filter(pl.col("model") == name) for name in models)
        judged = (
            only_supported(storage, some, config.supported_by, config.labeler, name)
            for name, some in zip(models, of_model, strict=True)
        )
        every = pl.concat(judged).sort("model", "layer", "unit")
    layers = {name: sorted({*every.filter(pl.col("model") == name)["layer"]}) for name in models}
    sizes = {name: int((every["model"] == name).sum()) for name in models}
    for model, other in pairs:
        if sizes[model] != sizes[other]:
            say(f"audit: {model} has {sizes[model]} described units, {other} {sizes[other]}: compare the shares")
    with_words = auditing.find_units(every, config.words)
    cards = [card_link(*unit) for unit in with_words.select("model", "layer", "unit").iter_rows()]
    with_words = with_words.with_columns(_exemplars(storage, with_words), pl.Series("card", cards, pl.String))
    text = _read_review(storage, config.name)
    earlier = None if text is None else auditing.read_review(text, review_path(storage, config.name))
    units, new = auditing.reviewed(with_words, earlier)
    audited = frame_of(table_of(AUDITED, units, audit=config.name))
    counts = auditing.count_pairs(pairs, units, sizes)
    audit = Audit(
        frame_of(table_of(AUDITS, counts, audit=config.name, images=images)), audited, auditing.compare_sides(counts)
    )
    described = descriptions_hash(storage, config.labeler, models)
    fingerprint = Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "audit": settings(config),
            "pairs": [list(pair) for pair in pairs],
            "descriptions": described,
            "units and verdicts": audited.rows(),
            "images": images,
            **supported_inputs(storage, config.supported_by, config.labeler, layers),
        }
    )
    about = {"labeler": config.labeler, "words": ", ".join(config.words), "descriptions": described}
    review = auditing.write_review(new, text) if text is None or len(new) else None
    return Auditing(config.name, audit, fingerprint, about, review, reviewed=text is not None)


def review_path(storage: Storage, name: str) -> str:
    """Where the review file lies."""
    return storage.uri(_review(storage, name))


def _review(storage: Storage, name: str) -> str:
    return storage.path(AUDITED, audit=name).replace(FILE_NAME, REVIEW)


def _read_review(storage: Storage, name: str) -> str | None:
    """The text of the review file; None if there is none yet.

    Raises:
        MilanError: It is not UTF-8.
    """
    place = _review(storage, name)
    try:
        return decode_text(storage.get(place)) if storage.exists(place) else None
    except UnicodeDecodeError as error:
        raise MilanError(f"{storage.uri(place)} is not UTF-8 ({error}): save it as a CSV file in UTF-8.") from error


def _exemplars(storage: Storage, units: pl.DataFrame) -> pl.Expr:
    """The shortened hash of the exemplars of each unit's layer; empty if there are none."""
    hashes = {}
    for model, layer in units.select("model", "layer").unique().iter_rows():
        made = storage.exists(storage.path(EXEMPLARS, model=model, layer=layer))
        hashes[f"{model}\n{layer}"] = storage.config_of(EXEMPLARS, model=model, layer=layer)[:12] if made else ""
    key = pl.concat_str("model", "layer", separator="\n")
    return key.replace_strict(list(hashes), list(hashes.values()), return_dtype=pl.String).alias("exemplars")


def _images(storage: Storage, models: Sequence[str], labeler: str) -> str:
    """The roots of the probe that all networks were dissected on.

    Raises:
        MilanError: There are several probes.
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
    stored = (probe for probe in probes if storage.count(MANIFEST, probe=probe))
    roots = {root for probe in stored for root in storage.read(MANIFEST, ["root"], probe=probe)["root"].to_pylist()}
    return ", ".join(sorted(roots))
