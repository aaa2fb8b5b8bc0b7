"""Section 6 on the built-in world: units for faces in networks that were trained without faces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from milan_ray.config import Resources
from milan_ray.engine import references
from milan_ray.engine.stage import run_stage
from milan_ray.names import SIGN
from milan_ray.report.figures import figure_path
from milan_ray.schema import AUDITS, DESCRIPTIONS, LEVELS
from milan_ray.scoring.auroc import auroc
from milan_ray.scoring.bootstrap import Interval, interval, ratio, resampling_counts
from milan_ray.scoring.evaluation import Row, unit_values
from milan_ray.scoring.search import search_descriptions
from milan_ray.showcase.demo import DECODER, EXEMPLARS, PROBE, SEARCH
from milan_ray.showcase.paper.claims import Claim, Section, evidence, shown, unit_lines
from milan_ray.showcase.paper.experiment_context import ExperimentContext
from milan_ray.stages import world
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.descriptions import run_descriptions
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage
from milan_ray.studies.auditing.run import Audit, AuditConfig, run_audit
from milan_ray.studies.auditing.statistics import BLURRED, PLAIN, Pair, side_rows
from milan_ray.studies.judges.run import HELD_OUT_SCENES, scenes_of
from milan_ray.studies.judges.statistics import IOU_THRESHOLD, presence
from milan_ray.studies.tables import read_frame
from milan_ray.world.lexicon import NAMES, concepts_in
from milan_ray.world.scenes import COLOURS, Scene
from milan_ray.world.training import paired_names, paired_tasks

WORDS = ("face|person|portrait", "mouth|lip")
"""Words of the world's annotators for a face and its mouth; not eyes, which unblurred animals have too."""

FACE_CONCEPTS = ("face", "mouth")
"""Concepts that only faces show."""

LATE = {"cnn": ("conv3", "conv4"), "resnet": ("layer2", "layer3")}
"""Layers that are described; the paper describes some layers too."""

CONFIG = AuditConfig("faces", WORDS)
SMALL = AuditConfig("faces (small)", WORDS)

QUERY = "|".join(COLOURS)
"""Query of the follow-up on units for faces of some people, who differ by the colour of their hair."""


def run(context: ExperimentContext) -> Section:
    """Audits pairs of the world's networks, for the claims of the paper's Section 6."""
    storage = context.storage
    if context.small:
        pairs, config = _described_pairs(storage), SMALL
    else:
        pairs, config = [(f"world/{name}", f"world/{blurred}") for name, blurred in paired_names()], CONFIG
        describe_pairs(storage, pairs, context.resources)
    audit = run_audit(storage, pairs, config)
    truth = face_truth(storage, pairs, config)
    judged = judge(audit, truth, pairs)
    follow = follow_up(audit, truth)
    return Section(
        "auditing",
        "Auditing: networks that never saw a face (paper, Section 6, Figure 5)",
        tuple(claims(audit, judged, follow)),
        (figure_path(storage, AUDITS, audit=config.name),),
        (
            evidence("Units described with words for faces, by pair", audit.pairs.drop("audit", "images")),
            evidence("Units that are for faces, by their overlap with faces in held-out scenes", judged.pairs),
            evidence("Found units of networks that never saw a face, by the colour they name", follow),
        ),
        tuple(_failures(judged.units)),
        unit_lines(audit.counted, 8),
    )


def describe_pairs(storage: Storage, pairs: Sequence[Pair], resources: Resources) -> None:
    """Trains missing networks, dissects all on unblurred scenes, and describes late layers."""
    world.train_networks(paired_tasks())
    models = [
        references.ModelRef(name, layers=LATE[name.removeprefix("world/").split("-")[0]])
        for pair in pairs
        for name in pair
    ]
    dissected = Exemplars(models, PROBE, EXEMPLARS).run(storage, resources).models
    run_stage(Encodings(dissected, EncoderRef(DECODER)), storage, resources)
    run_descriptions(storage, dissected, SEARCH, resources)


def _described_pairs(storage: Storage) -> list[Pair]:
    """Pairs of any described networks, for tests that do not train pairs."""
    names = sorted({keys["model"] for keys in storage.partitions(DESCRIPTIONS, labeler="milan")})
    names = [name for name in names if name.removeprefix("world/").split("-")[0] in LATE]
    return [(name, other) for name, other in zip(names, names[1:] + names[:1], strict=True) if name != other]


@dataclass(frozen=True)
class Truth:
    """The responses of units to unblurred held-out scenes.

    Attributes:
        units: Columns model, layer, unit, concept (best by intersection over union), iou, face (bool: the concept is
            a face's alone, and the overlap above network dissection's threshold), auroc (of the activation, for scenes
            with a face).
        activations: float32 (N, U), maxima over positions; columns as the rows of ``units``.
        scenes: The N scenes.
    """

    units: pl.DataFrame
    activations: np.ndarray
    scenes: list[Scene]


def face_truth(storage: Storage, pairs: Sequence[Pair], config: AuditConfig) -> Truth:
    """Which units are for faces, whatever their descriptions."""
    layers = {
        name: [
            keys["layer"]
            for keys in storage.partitions(DESCRIPTIONS, labeler=config.labeler, model=name)
            if SIGN not in keys["layer"]
        ]
        for pair in pairs
        for name in pair
    }
    truths = world.truth(storage, layers, HELD_OUT_SCENES)
    scenes = scenes_of(HELD_OUT_SCENES)
    faces = presence(scenes)[:, [NAMES.index("face")]]
    frames = []
    for model, names in layers.items():
        units = pl.concat(
            read_frame(storage, LEVELS, ["unit"], model=model, layer=layer).select(
                pl.lit(model).alias("model"), pl.lit(layer).alias("layer"), pl.col("unit").cast(pl.Int32)
            )
            for layer in names
        )
        truth = truths[model]
        concepts = pl.Series("concept", [NAMES[number] for number in truth.concept])
        areas = auroc(truth.activations, faces)[:, 0]
        frames.append(units.with_columns(concepts, pl.Series("iou", truth.iou), pl.Series("auroc", areas)))
    face = pl.col("concept").is_in(FACE_CONCEPTS) & (pl.col("iou") > IOU_THRESHOLD)
    units = pl.concat(frames).with_columns(face.alias("face"))
    return Truth(units, np.concatenate([truths[model].activations for model in layers], axis=1), scenes)


@dataclass(frozen=True)
class Judged:
    """The audit against the truth.

    Attributes:
        pairs: Per pair the units that are for faces, and those of them that the audit found, on both sides.
        units: :attr:`Truth.units` with found (bool) and description (null for units that the audit did not find).
        rows: Precision, recall and base rate, and units for faces per network on both sides and their difference:
            (system, metric, value with its interval, networks or pairs, note).
    """

    pairs: pl.DataFrame
    units: pl.DataFrame
    rows: list[Row]

    def of(self, system: str, metric: str) -> Interval:
        """One value of ``rows``."""
        return next(value for *key, value, _, _ in self.rows if key == [system, metric])


def judge(audit: Audit, truth: Truth, pairs: Sequence[Pair]) -> Judged:
    """Compares what the audit counts with the units that are for faces."""
    counted = audit.counted.select("model", "layer", "unit", "description")
    units = truth.units.join(counted, on=["model", "layer", "unit"], how="left", maintain_order="left")
    units = units.with_columns(pl.col("description").is_not_null().alias("found"))
    sums = units.group_by("model", maintain_order=True).agg(
        pl.len().alias("of"), pl.col("face", "found").sum(), (pl.col("face") & pl.col("found")).sum().alias("both")
    )
    face, both = (dict(sums.select("model", name).iter_rows()) for name in ("face", "both"))
    table = pl.DataFrame(
        {
            "model": [model for model, _ in pairs],
            "for faces": [face[model] for model, _ in pairs],
            "of them found": [both[model] for model, _ in pairs],
            "blurred": [other for _, other in pairs],
            "blurred, for faces": [face[other] for _, other in pairs],
            "blurred, of them found": [both[other] for _, other in pairs],
        }
    )
    counts = resampling_counts(len(sums))
    rows: list[Row] = []
    for metric, whole, part, note in (
        ("precision", "found", "both", "share of the units found that are for faces"),
        ("recall", "face", "both", "share of the units for faces that are found"),
        ("base rate", "of", "face", "share of all described units that are for faces"),
    ):
        statistics = sums.select(whole, part).to_numpy().astype(np.float64)
        rows.append(("audit", metric, interval(statistics, ratio, counts), len(sums), note))
    sides = (unit_values(table[name].to_numpy()) for name in ("for faces", "blurred, for faces"))
    counts = resampling_counts(len(pairs), 10_000)
    rows += side_rows("units for faces", "mean over networks", "paired, resampled over pairs", sides, counts)
    return Judged(table, units, rows)


def follow_up(audit: Audit, truth: Truth) -> pl.DataFrame:
    """Found units of blurred networks whose descriptions name a colour: whether they prefer faces with hair of it.

    Returns:
        Columns model, layer, unit, description, colours, faces (held-out scenes with one big face), auroc (of the
        activation among these, for hair of one of the colours; null where none or all have it), by relevance.
    """
    others = set(audit.pairs["other"])
    blurred = audit.counted.filter(pl.col("model").is_in(others)).select("model", "layer", "unit", "description")
    hits = search_descriptions(blurred, QUERY) if len(blurred) else blurred
    places = {key: place for place, key in enumerate(truth.units.select("model", "layer", "unit").iter_rows())}
    faces = [place for place, scene in enumerate(truth.scenes) if scene.label == "face"]
    hair = [truth.scenes[place].things[0].colour for place in faces]
    rows = []
    for model, layer, unit, text in hits.select("model", "layer", "unit", "description").iter_rows():
        colours = sorted(concepts_in(text) & set(COLOURS))
        activations = truth.activations[np.ix_(faces, [places[model, layer, unit]])]
        area = float(auroc(activations, np.array([[colour in colours] for colour in hair]))[0, 0])
        rows.append((model, layer, unit, text, ", ".join(colours), len(faces), None if np.isnan(area) else area))
    schema = {"model": pl.String, "layer": pl.String, "unit": pl.Int32, "description": pl.String, "colours": pl.String}
    return pl.DataFrame(rows, {**schema, "faces": pl.Int64, "auroc": pl.Float64}, orient="row")


def claims(audit: Audit, judged: Judged, follow: pl.DataFrame) -> list[Claim]:
    """Compares the claims of Section 6 with the results."""
    figures = {(system, metric): value for system, metric, value, *_ in audit.rows}
    apart = figures[f"{PLAIN} − {BLURRED}", "units per network"]
    p = figures[f"{PLAIN} − {BLURRED}", "p (signed ranks)"].value
    plain, blurred = (int(audit.pairs[name].sum()) for name in ("units", "other_units"))
    true_plain, true_blurred = (int(judged.pairs[name].sum()) for name in ("for faces", "blurred, for faces"))
    gap = judged.of(f"{PLAIN} − {BLURRED}", "units for faces")
    precision, recall, base = (judged.of("audit", name) for name in ("precision", "recall", "base rate"))
    looked = "" if (audit.units["verdict"] != "").any() else "nobody inspected the units here; the truth says more"
    results = [
        Claim(
            "Networks trained on blurred images have fewer units described with words for faces.",
            "213 units in unblurred, 142 in blurred models, 12 pairs, after inspection (Figure 5)",
            f"{plain} and {blurred} units in {len(audit.pairs)} pairs; per pair {apart.value:.1f} fewer "
            f"[{apart.low:.1f}, {apart.high:.1f}], p = {p:.2g} (signed ranks)",
            apart.low > 0,
            looked,
        ),
        Claim(
            "That is so because they have fewer units for faces.",
            "not measured: the paper's networks have no known truth",
            f"{true_plain} and {true_blurred} units overlap a face or its mouth more than anything else; per pair "
            f"{gap.value:.1f} fewer [{gap.low:.1f}, {gap.high:.1f}]",
            gap.low > 0,
        ),
        Claim(
            "Blurring reduces, but does not eliminate, units selective for unblurred faces.",
            "142 of 213 remain",
            f"{true_blurred} units for faces in networks that never saw one ({true_plain} in the others)",
            0 < true_blurred < true_plain,
        ),
        Claim(
            "Descriptions find the units that are for faces.",
            "by inspection only: the counts are of units that people confirmed",
            f"precision {shown(precision)}, recall {shown(recall)}; {shown(base)} of all units are for faces",
            precision.low > base.high,
            "a unit is for faces if, of all concepts, a face or its mouth overlaps it most in held-out scenes",
        ),
    ]
    values = follow["auroc"].drop_nulls()
    named = (
        f"{len(follow)} found units of blurred networks name a colour; among held-out faces their activation tells "
        f"hair of it with a mean AUROC of {float(np.mean(values.to_numpy())):.2f} (n = {len(values)})"
        if len(values)
        else "no found unit of a blurred network names a colour"
    )
    results.append(
        Claim(
            "Some of these units prefer faces of some people, which their exemplars show.",
            "two examples (Figure 6): faces of women, faces of Asian people",
            named,
            None,
            "the world's people differ by the colour of their hair only; too few units to say more",
        )
    )
    return results


def _failures(units: pl.DataFrame) -> list[str]:
    wrong = units.filter("found", ~pl.col("face")).sort("iou", descending=True)
    missed = units.filter("face", ~pl.col("found")).sort("iou", descending=True)
    lines = [f"{len(wrong)} units are found that are not for faces:"] if len(wrong) else []
    lines += [
        f"{row['model']} {row['layer']} {row['unit']}: “{row['description']}”, but {row['concept']} overlaps most "
        f"(IoU {row['iou']:.2f}; AUROC for scenes with a face {row['auroc']:.2f})"
        for row in wrong.head(6).to_dicts()
    ]
    lines += [f"{len(missed)} units for faces are not found:"] if len(missed) else []
    missing = missed.head(6).select("model", "layer", "unit", "concept", "iou").iter_rows()
    return lines + [f"{model} {layer} {unit}: {concept}, IoU {iou:.2f}" for model, layer, unit, concept, iou in missing]
