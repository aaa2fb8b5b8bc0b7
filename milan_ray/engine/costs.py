"""Estimates of a run's cost: counts, seconds, bytes and money, as formulas over the measurements of a small sample.

:mod:`milan_ray.benchmarks.sample` measures the sample; docs/planning.md explains the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from milan_ray.engine.model_cache import together

HOUR = 3600.0


@dataclass(frozen=True)
class LayerShape:
    """Size of a dissected layer.

    Attributes:
        layer: Module path.
        units: Channels U.
        height: Rows of its maps.
        width: Columns of its maps.
    """

    layer: str
    units: int
    height: int = 1
    width: int = 1


@dataclass(frozen=True)
class ModelCost:
    """Measured cost of a model.

    Attributes:
        name: Registered name.
        layers: Its dissected layers.
        seconds: Seconds per image on one actor: forward pass, exemplars and levels of all layers.
        view: Key of the view of its exemplars; models with the same view share encoder passes, and a shard's images.
        weights: Bytes of its weights.
    """

    name: str
    layers: tuple[LayerShape, ...]
    seconds: float
    view: str = ""
    weights: int = 0

    @property
    def units(self) -> int:
        """Units of all layers."""
        return sum(layer.units for layer in self.layers)


@dataclass(frozen=True)
class TableSize:
    """Size of a table on disk.

    Attributes:
        per_file: Bytes of a file without rows.
        per_row: Bytes per row.
    """

    per_file: float
    per_row: float

    def bytes(self, rows: float, files: float) -> float:
        """Bytes of a number of rows in a number of files."""
        return files * self.per_file + rows * self.per_row

    @classmethod
    def fit(cls, bytes_: int, rows: int, empty: int) -> TableSize:
        """Computes the size per file and row from a file's bytes and the bytes of the same file without rows."""
        return cls(float(empty), max(0, bytes_ - empty) / max(1, rows))


@dataclass(frozen=True)
class Sample:
    """Measurements of a small run.

    Attributes:
        images: Images of the run.
        device: ``cpu`` or ``cuda``.
        threads: Torch threads of an actor.
        models: The models.
        read: Seconds to read, decode and resize an image.
        picture: Seconds to write an exemplar's view.
        tables: Table → its size.
        encode: Seconds of an encoder pass per image; None without a captioner.
        pool: Seconds to pool an image's maps with one mask; None without a captioner.
        search: Seconds of the beam search per unit; None without a captioner.
        beam_size: Candidates per unit; 0 without a captioner.
        labelers: Labels per unit: the captioner gives one by log p(d|E) − λ·log p(d) and one by log p(d|E).
    """

    images: int
    device: str
    threads: int
    models: tuple[ModelCost, ...]
    read: float
    picture: float
    tables: Mapping[str, TableSize] = field(default_factory=dict)
    encode: float | None = None
    pool: float | None = None
    search: float | None = None
    beam_size: int = 0
    labelers: int = 2


@dataclass(frozen=True)
class Wanted:
    """The run that is planned.

    Attributes:
        images: Probe images.
        copies: Number of models like each of the sample's.
        k: Exemplars per unit.
        quantile: q of the levels.
        samples: Positions per unit from which levels are computed.
        map_budget: Bytes of maps that a layer's state may hold.
        shard_size: Images per shard.
        actors: Actors that work at the same time.
        pooled: Whether every unit's maximum and mean on every image are stored too.
        price: Price of an actor-hour, in any currency; None for no estimate of the price.
    """

    images: int
    copies: int = 1
    k: int = 15
    quantile: float = 0.99
    samples: int = 2**20
    map_budget: int = 256 * 2**20
    shard_size: int = 256
    actors: int = 1
    pooled: bool = False
    price: float | None = None


@dataclass(frozen=True)
class Line:
    """One kind of work.

    Attributes:
        what: Its name.
        count: Number of repetitions.
        seconds: Seconds of one actor for all repetitions.
    """

    what: str
    count: float
    seconds: float

    @property
    def hours(self) -> float:
        """Actor-hours."""
        return self.seconds / HOUR


@dataclass(frozen=True)
class Table:
    """One table of the run directory.

    Attributes:
        name: Its name.
        rows: Its rows.
        bytes: Its bytes on disk.
    """

    name: str
    rows: float
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a run.

    Attributes:
        wanted: The run.
        models: Number of models.
        units: Number of units of all models.
        work: The work, in the order of the stages.
        tables: The tables that the run makes.
        partials: Bytes of work in progress of one model, which are removed when its tables are public.
    """

    wanted: Wanted
    models: int
    units: int
    work: tuple[Line, ...]
    tables: tuple[Table, ...]
    partials: float

    @property
    def hours(self) -> float:
        """Actor-hours in all."""
        return sum(line.hours for line in self.work)

    @property
    def elapsed(self) -> float:
        """Hours with all actors busy, without the start of nodes and processes or the wait for the last shard."""
        return self.hours / self.wanted.actors

    @property
    def bytes(self) -> float:
        """Bytes of all tables."""
        return sum(table.bytes for table in self.tables)

    @property
    def price(self) -> float | None:
        """Price of the actor-hours; None without a price per hour."""
        return None if self.wanted.price is None else self.hours * self.wanted.price

    def record(self) -> dict[str, object]:
        """All fields and totals, for JSON."""
        totals = {name: getattr(self, name) for name in ("hours", "elapsed", "bytes", "price")}
        return {**asdict(self), **totals}


def distinct_images(images: int, k: int, units: int) -> float:
    """Expected number of distinct images among the exemplars of U units: N·(1 − (1 − k/N)^U).

    The formula assumes that each unit's k images are drawn at random. Real units share images, so it is an upper
    estimate; it never exceeds N or U·k.

    Args:
        images: Probe images N.
        k: Exemplars per unit.
        units: Units U that share a view.
    """
    if units == 0 or images == 0:
        return 0.0
    share = min(1.0, k / images)
    return float(images) if share == 1 else -images * math.expm1(units * math.log1p(-share))


def emitted(per_shard: float, kept: float, shards: float) -> float:
    """Values per unit that an actor writes: Σ_j min(p, c/j) over its shards j = 1 … S.

    In a random order, the j-th shard holds c/j of the c largest values so far, and cannot write more than its p values.

    Args:
        per_shard: Values per unit in a shard, p.
        kept: Values per unit that are kept, c.
        shards: Shards of the actor, S.
    """
    shards = math.ceil(shards)
    # Of the first shards, every value is among the largest.
    full = min(shards, math.floor(kept / per_shard)) if per_shard else 0
    return full * per_shard + kept * (_harmonic(shards) - _harmonic(full))


def emitted_tail(per_shard: float, kept: float, shards: float) -> float:
    """Activations per unit that an actor writes for a level: those above the lower bound of the *earlier* shards.

    Their number is p + Σ_j min(p, c/j) over j = 1 … S − 1; see :func:`emitted`.
    """
    return per_shard + emitted(per_shard, kept, max(0, math.ceil(shards) - 1))


def _harmonic(n: int) -> float:
    """1 + 1/2 + … + 1/n."""
    if n < 64:
        return sum(1 / j for j in range(1, n + 1))
    return math.log(n) + 0.5772156649015329 + 1 / (2 * n) - 1 / (12 * n * n)


def carries_maps(layer: LayerShape, wanted: Wanted) -> bool:
    """Whether shards store a layer's maps with its exemplars; otherwise the exemplars take another forward pass."""
    return 4 * layer.units * wanted.k * layer.height * layer.width <= wanted.map_budget


def partial_bytes(layer: LayerShape, wanted: Wanted) -> float:
    """Bytes, before compression, of one layer's work in progress by all actors.

    It consists of candidates of the top k with their maps (4·h·w + 12 bytes each) and of activations that may decide
    the level (4 bytes each).
    """
    shards = math.ceil(wanted.images / wanted.shard_size)
    actors = min(wanted.actors, shards)
    own = shards / actors
    maps = 4 * layer.height * layer.width if carries_maps(layer, wanted) else 0
    candidates = emitted(min(wanted.shard_size, wanted.k), wanted.k, own) * (maps + 12)
    positions = _positions(layer, wanted)
    tail = _tail(layer, wanted)
    return layer.units * actors * (candidates + 4 * emitted_tail(wanted.shard_size * positions, tail, own))


def _positions(layer: LayerShape, wanted: Wanted) -> int:
    """Positions of a unit's map that count for its level, on each image."""
    return min(layer.height * layer.width, max(1, math.ceil(wanted.samples / wanted.images)))


def _tail(layer: LayerShape, wanted: Wanted) -> int:
    """Activations that decide a unit's level."""
    return math.ceil((1 - wanted.quantile) * wanted.images * _positions(layer, wanted)) + 2


def images_read(models: Sequence[ModelCost], wanted: Wanted) -> int:
    """Images that are read and decoded: once for all models of a view that an actor has room for."""
    sizes: dict[str, list[int]] = {}
    for model in models:
        states = sum(4 * layer.units * _tail(layer, wanted) for layer in model.layers)
        sizes.setdefault(model.view, []).extend([model.weights + states] * wanted.copies)
    return wanted.images * sum(len(together(each)) for each in sizes.values())


def faster(sample: Sample, times: float) -> Sample:
    """The sample on actors with faster forward passes, encoder passes and searches.

    Reading, decoding and writing images run on the CPU and take as long as before.
    """
    models = tuple(replace(model, seconds=model.seconds / times) for model in sample.models)
    encode, pool, search = (s and s / times for s in (sample.encode, sample.pool, sample.search))
    return replace(sample, models=models, encode=encode, pool=pool, search=search)


def estimate(sample: Sample, wanted: Wanted) -> Estimate:
    """Estimates the cost of a run from a measured sample.

    Args:
        sample: The measured sample.
        wanted: The run.
    """
    models, copies = sample.models, wanted.copies
    units = copies * sum(model.units for model in models)
    layers = copies * sum(len(model.layers) for model in models)
    k = min(wanted.k, wanted.images)
    rows = units * k
    again = [
        copies
        * distinct_images(
            wanted.images, k, sum(layer.units for layer in model.layers if not carries_maps(layer, wanted))
        )
        for model in models
    ]
    views: dict[str, int] = {}
    for model in models:
        views[model.view] = views.get(model.view, 0) + copies * model.units
    distinct = sum(distinct_images(wanted.images, k, shared) for shared in views.values())
    passes = wanted.images * copies * len(models)
    forward = wanted.images * copies * sum(model.seconds for model in models)
    decoded = images_read(models, wanted)
    work = [
        Line("images read and decoded", decoded, decoded * sample.read),
        Line("forward passes, exemplars and levels", passes, forward),
        Line(
            "forward passes of winners, for masks",
            sum(again),
            sum(n * model.seconds for n, model in zip(again, models, strict=True)),
        ),
        Line("views of exemplars", distinct, distinct * (sample.read + sample.picture)),
    ]
    files = {"exemplars": layers, "levels": layers}
    counted = {"manifest": float(wanted.images), "exemplars": rows, "levels": units, "views": distinct}
    if wanted.pooled:
        counted["pooled"] = wanted.images * layers
    if sample.encode is not None and sample.pool is not None and sample.search is not None:
        work += [
            Line("encoder passes", distinct, distinct * sample.encode),
            Line("regions pooled", rows, rows * sample.pool),
            Line("units searched", units, units * sample.search),
        ]
        counted |= {"encodings": rows, "candidates": units * sample.beam_size, "descriptions": units * sample.labelers}
        files |= {"encodings": layers, "candidates": layers, "descriptions": layers * sample.labelers}
    files |= {"views": math.ceil(wanted.images / 256) * len(views), "pooled": layers}
    tables = [
        Table(name, count, sample.tables[name].bytes(count, files.get(name, 1)))
        for name, count in counted.items()
        if name in sample.tables
    ]
    partials = max((sum(partial_bytes(layer, wanted) for layer in model.layers) for model in models), default=0.0)
    return Estimate(
        wanted, copies * len(models), units, tuple(line for line in work if line.count), tuple(tables), partials
    )


def in_bytes(count: float) -> str:
    """Formats a number of bytes in decimal units: ``1.2 TB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def in_hours(hours: float) -> str:
    """Formats a duration: ``40 s``, ``12 min``, ``3.4 h``, ``56 days``."""
    if hours < 2 / 60:
        return f"{hours * HOUR:.0f} s"
    if hours < 2:
        return f"{hours * 60:.0f} min"
    return f"{hours:.3g} h" if hours < 72 else f"{hours / 24:,.0f} days"


def text(total: Estimate, sample: Sample) -> str:
    """Formats an estimate for a terminal."""
    wanted = total.wanted
    lines = [
        f"{total.models:,} models, {total.units:,} units, {wanted.images:,} images; measured on {sample.images}, one "
        f"{sample.device} actor of {sample.threads} thread{'s' * (sample.threads > 1)}:"
    ]
    for model in sample.models:
        each = f"{1000 * model.seconds:.3g} ms an image"
        copies = f" × {wanted.copies:,}" if wanted.copies > 1 else ""
        lines.append(f"  {model.name}{copies}: {len(model.layers)} layers, {model.units:,} units, {each}")
    lines += ["", f"{'work':40} {'times':>16} {'actor-hours':>14}"]
    lines += [f"{line.what:40} {line.count:>16,.0f} {line.hours:>14,.3g}" for line in total.work]
    lines += ["", f"{'table':40} {'rows':>16} {'size':>14}"]
    lines += [f"{table.name:40} {table.rows:>16,.0f} {in_bytes(table.bytes):>14}" for table in total.tables]
    actors = f"{wanted.actors:,} actor{'s' * (wanted.actors > 1)}"
    lines += [
        "",
        f"{total.hours:,.3g} actor-hours; with {actors} busy {in_hours(total.elapsed)}, and the time in which nodes "
        "and processes start",
        f"{in_bytes(total.bytes)} stay; {in_bytes(total.partials)} at most, before compression, are written meanwhile "
        "of the model at work",
    ]
    if total.price is not None:
        lines.append(f"{total.price:,.2f} at {wanted.price:g} an actor-hour; storage and requests come on top")
    if sample.encode is None:
        lines.append("descriptions are not in it: give --decoder or --milan")
    return "\n".join(lines)
