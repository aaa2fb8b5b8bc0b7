"""End-to-end benchmark: from a folder of photographs to a description of every unit, through the real job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from milan_ray.benchmarks.captioners import Sizes, trained
from milan_ray.benchmarks.encode import random_encoder
from milan_ray.benchmarks.harness import Options, Result, elapsed, photographs
from milan_ray.captioner.captioner import Captioner
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.cluster import connected
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage
from milan_ray.labelers.milan import MILAN
from milan_ray.schema import DESCRIPTIONS
from milan_ray.stages.captioners import EncoderRef, save_captioner
from milan_ray.stages.descriptions import Search, run_descriptions
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

MODEL = "resnet18/imagenet"
LAYERS = ("conv1", "layer1", "layer2", "layer3", "layer4")

REFERENCE = 143.6 + 1024 / 0.50
"""Seconds of the reference for 1,024 units over 300 photographs, on two cores."""


def run(options: Options) -> Iterator[Result]:
    """Describes all units over all photographs, then over half the photographs, then a quarter of the units."""
    photos, sizes = 16 if options.short else 300, Sizes.of(options)
    with TemporaryDirectory(prefix="milan-end-to-end-") as folder:
        encoder = random_encoder(sizes.encoder, Path(folder))
        captioner = trained(options, sizes)

        def describe(count: int, layers: tuple[str, ...]) -> Result:
            job = _Job(count, layers, encoder, Storage(Path(folder) / f"{count}-{len(layers)}"))
            with photographs(options, count) as some:
                return job.run(captioner, some)

        if options.short:
            yield describe(photos, LAYERS[:1])
            return
        everything = describe(photos, LAYERS)
        yield everything
        half = describe(photos // 2, LAYERS)
        more = (everything.seconds[0] - half.seconds[0]) / (photos - photos // 2)
        yield half.with_facts(seconds_for_one_more_photograph=more)
        quarter = describe(photos, LAYERS[:3])
        more = (everything.seconds[0] - quarter.seconds[0]) / float(everything.work - quarter.work)
        yield quarter.with_facts(seconds_for_one_more_unit=more)


@dataclass(frozen=True)
class _Job:
    photos: int
    layers: tuple[str, ...]
    encoder: EncoderRef
    storage: Storage

    def run(self, captioner: Captioner, folder: Path) -> Result:
        """Runs the job once, as ``milan-ray describe`` does; the result's facts hold the seconds of its parts."""
        storage, resources = self.storage, Resources()
        model = ModelRef(MODEL, "random", self.layers)
        probe = ProbeRef((str(folder),))
        save_captioner(storage, "benchmark", captioner, "Trained for a benchmark.")
        models = {MODEL: self.layers}
        seconds = {}

        def job() -> None:
            with connected(resources):
                for stage, function in {
                    "exemplars": lambda: Exemplars([model], probe, ExemplarConfig()).run(storage, resources),
                    "encodings": lambda: run_stage(Encodings(models, self.encoder), storage, resources),
                    "descriptions": lambda: run_descriptions(storage, models, Search("benchmark"), resources),
                }.items():
                    seconds[f"{stage}, seconds"] = elapsed(function)

        total = elapsed(job)
        units = sum(storage.count(DESCRIPTIONS, labeler=MILAN, model=MODEL, layer=layer) for layer in self.layers)
        whole = units == 1024 and self.photos == 300
        facts = {**seconds, "starting and ending Ray, seconds": total - sum(seconds.values())}
        name = f"{units} units over {self.photos} photographs"
        return Result(name, (total,), (REFERENCE,) if whole else (), units, "units", facts)
