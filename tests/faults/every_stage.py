"""Small jobs of every stage, in this process and on threads: worlds of stages, each of which needs those before."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import spacy
from PIL import Image
from toys import toy_captioner, train_here

from milan_ray.annotations.layout import write_annotations
from milan_ray.annotations.load import load
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.fit import Sizes
from milan_ray.config import ContrastConfig, ExemplarConfig, Resources, TrainingConfig
from milan_ray.engine import tuner
from milan_ray.engine.cluster import connected
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage, run_stages
from milan_ray.labelers.clip import Clip
from milan_ray.labelers.clip_dissect import ClipDissect
from milan_ray.labelers.dnd.labeler import DescribeAndDissect
from milan_ray.models.generators import GeneratorRef
from milan_ray.models.image_captions import ImageCaptionerRef
from milan_ray.models.image_text import ImageTextRef
from milan_ray.schema import (
    ANNOTATIONS,
    CANDIDATES,
    CONTRAST_ENCODINGS,
    CONTRASTS,
    DESCRIPTIONS,
    DRAWINGS,
    ENCODINGS,
    EXEMPLARS,
    IMAGE_EMBEDDINGS,
    POOLED,
    TRAINING,
    TRIALS,
    UNIT_SCORES,
    VERDICTS,
    Table,
)
from milan_ray.stages import embeddings, tuning_trial
from milan_ray.stages import training as train
from milan_ray.stages import tuning as tune
from milan_ray.stages.annotations_import import run_import
from milan_ray.stages.captioners import EncoderRef, load_captioner, save_captioner
from milan_ray.stages.clip_dissect import clip_dissect_stages
from milan_ray.stages.concept_labels import ConceptLabels, LabelConfig
from milan_ray.stages.contrast_descriptions import contrast_stages
from milan_ray.stages.contrasts import ContrastSource
from milan_ray.stages.cosy import CosyConfig, CosyScores
from milan_ray.stages.descriptions import Search, run_descriptions
from milan_ray.stages.dnd import stage as dnd
from milan_ray.stages.dnd.config import DndConfig, SummariserRef, drawings_identity
from milan_ray.stages.dnd.stage import dnd_stages, run_dnd
from milan_ray.stages.embeddings import ImageEmbeddings, text_embeddings
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import DissectedModels, Exemplars
from milan_ray.stages.rating_draws import DrawConfig, draw_stages
from milan_ray.stages.rerank import reranking_stages
from milan_ray.stages.scores import ScoreConfig, described_layers, run_scores, score_stages
from milan_ray.stages.tuning_statistics import Sweep, Trial
from milan_ray.storage import Storage
from milan_ray.studies.ablation import run as ablate
from milan_ray.studies.analysis.run import Analysis, AnalysisConfig
from milan_ray.studies.comparison.run import find_comparison
from milan_ray.studies.cut_and_paste.run import CutAndPaste, CutAndPasteConfig
from milan_ray.studies.editing.run import Editing, EditingConfig

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
TINY, FLAGS, COLOURS = (str(PLUGINS / f"{name}.py") for name in ("tiny_models", "flags", "colours"))
HERE = Resources()
CNN = ModelRef("tiny/cnn", layers=("0", "6"), plugins=(TINY,))
ENCODER = EncoderRef("tiny", plugins=(TINY,))
LAYERS = {"tiny/cnn": CNN.layers}
SEARCH = Search("toy", beam_size=4, length=4, lam=0.5)
CONFIG = ExemplarConfig(k=2, batch_size=16, shard_size=20, pooled=True)
WATCHER = ModelRef("flags/watcher", layers=("seen",), plugins=(FLAGS,))
FIELDS = ProbeRef(("flags",), plugins=(FLAGS,))
FEW = ExemplarConfig(k=2, quantile=0.95, batch_size=32, shard_size=64, pooled=True)
TRUTH = ImageTextRef("flags/truth")
SCORING = ScoreConfig(share=0.9, top=0.2, retrieved=10)
COLOUR_MODEL = ModelRef("colours/watcher", plugins=(COLOURS,))
SCENES = ProbeRef(("colours",), plugins=(COLOURS,))
SHOTS = ExemplarConfig(k=3, batch_size=16, shard_size=96, pooled=True)


@dataclass(frozen=True)
class Stage:
    """A job.

    Attributes:
        run: What to do in a storage.
        tables: Table → stage of the row of runs that each of its partitions has.
    """

    run: Callable[[Storage], object]
    tables: dict[Table, str]


def captioner() -> Captioner:
    return toy_captioner(length=4, beam_size=4, lam=0.5)


def annotate(storage: Storage) -> None:
    """Gives the toy captioner, and what people say of the units of the first layer."""
    save_captioner(storage, "toy", captioner(), "A toy.")
    keys = {"source": "people", "model": "tiny/cnn", "layer": "0"}
    texts = ["a red dog", "dark house", "the dark dog", "red house", "a house", "dogs"]
    columns: dict[str, object] = {key: [value] * len(texts) for key, value in keys.items()}
    columns |= {"unit": range(len(texts)), "annotator": ["1"] * len(texts), "text": texts}
    storage.write(ANNOTATIONS, ANNOTATIONS.table(columns), "said", **keys)


def contrast(storage: Storage, probe: ProbeRef, ref: ImageTextRef) -> None:
    source = ContrastSource(ImageEmbeddings(ref, probe), {"tiny/cnn": CNN}, CONFIG, ContrastConfig(3, 2))
    run_stages(contrast_stages(LAYERS, SEARCH, load_captioner(storage, "toy"), ENCODER, source, 0.3), storage, HERE)


def teach(storage: Storage) -> None:
    config = TrainingConfig(max_epochs=2, learning_rate=0.01, decoder_batch_size=4, lm_batch_size=4, hold_out=0.2)
    job = train.TrainingJob("taught", "people", (("tiny/cnn", "0"),), ENCODER, config, Sizes(4, 6))
    train_here(storage, job)


def look(storage: Storage) -> DissectedModels:
    return Exemplars([WATCHER], FIELDS, FEW).run(storage, HERE)


def explain(storage: Storage) -> None:
    stage = ConceptLabels(look(storage).models, [WATCHER], FIELDS, FEW, LabelConfig())
    assert stage.run(storage, HERE) == {}


def name(storage: Storage) -> None:
    layers = {"flags/watcher": ("seen",)}
    for stage in clip_dissect_stages(layers, FIELDS, ClipDissect(("red", "green", "blue", "left")), TRUTH):
        run_stage(stage, storage, HERE)


def draw_to_rate(storage: Storage) -> None:
    described = described_layers(storage, ["flags/watcher"])
    judge = ImageEmbeddings(TRUTH, FIELDS)
    run_stages(draw_stages(described, FIELDS, judge, DrawConfig(draws=20)), storage, HERE)


def score(storage: Storage) -> None:
    stages = score_stages(described_layers(storage, ["flags/watcher"]), FIELDS, TRUTH, SCORING)
    run_scores(storage, stages, SCORING, HERE)


def draw(storage: Storage) -> None:
    described = described_layers(storage, ["flags/watcher"])[:1]
    stage = CosyScores(described, FIELDS, [WATCHER], GeneratorRef("flags/fields"), CosyConfig(4), SCORING)
    run_scores(storage, [stage], SCORING, HERE)


def watch(storage: Storage) -> DissectedModels:
    return Exemplars([COLOUR_MODEL], SCENES, SHOTS).run(storage, HERE)


def describe_and_dissect(storage: Storage, generator: GeneratorRef | None, tag: str = "") -> None:
    how = DndConfig(
        DescribeAndDissect("topk-squared-mean", tag), ImageCaptionerRef("colours/names"), SummariserRef(),
        generator, ImageTextRef("colours/grid"), images=3, crops=1, drawn=2, plugins=(COLOURS,),
    )  # fmt: skip
    layers, identity = watch(storage).models, drawings_identity(storage, how)
    assert run_dnd(storage, dnd_stages([COLOUR_MODEL], layers, SCENES, SHOTS, how, identity), HERE) == {}


def draw_scenes(storage: Storage) -> None:
    describe_and_dissect(storage, GeneratorRef("world/painter"))


def find_scenes(storage: Storage) -> None:
    describe_and_dissect(storage, None, "probe")


def tune_here(storage: Storage) -> None:
    """A sweep whose trials run here, where Ray Tune would start a process for each."""
    sweep = Sweep((2,), (0.0, 0.5), ("greedy", "rerank"), (4,), "bleu-2", samples=10)
    tune.Tuning(tuning_trial.TuningJob("sweep", "toy", "people", (("tiny/cnn", "0"),), sweep)).run(storage, HERE)


def try_here(storage: Storage, task: tuning_trial.Task, trials: list[Trial], resources: Resources) -> None:
    for trial in trials:
        tuning_trial.run_trial({"trial": asdict(trial)}, task)


def in_turn(function: Callable[[object], object], items: Sequence[object], *_: float) -> Iterator[tuple[int, object]]:
    """Tasks that keep one network, which in processes of their own each have theirs."""
    for number, item in enumerate(items):
        yield number, function(item)


def bring_in(folder: Path) -> Callable[[Storage], object]:
    def run(storage: Storage) -> None:
        (published,) = load(str(folder))
        run_import(storage, published)

    return run


def published_set(root: Path) -> Path:
    """A published set of two layers."""
    rng = np.random.default_rng(0)
    for layer in ("conv", "last"):
        (root / layer).mkdir(parents=True)
        np.save(root / layer / "images.npy", rng.integers(0, 256, (3, 2, 3, 16, 16), dtype=np.uint8))
        np.save(root / layer / "masks.npy", rng.integers(0, 2, (3, 2, 1, 16, 16), dtype=np.uint8))
    write_annotations(root / "annotations.csv", [("conv", 0, "a dog"), ("conv", 2, "grass"), ("last", 1, "sky")])
    return root


CLASSES = ModelRef("tiny/cnn", layers=("0", "2"), plugins=(TINY,))
SAID = {
    "0": ("lines", "text on signs", "roofs", "lines", "a word", "lines"),
    "2": ("lines", "dog cup", "red dog", "lines", "red lines", "text", "red", "dogs"),
}


def say_words(storage: Storage) -> None:
    """Descriptions of two layers."""
    for layer, texts in SAID.items():
        keys = {"labeler": "milan", "model": "tiny/cnn", "layer": layer}
        rows = [{**keys, "unit": u, "description": t, "score": 0.0, "n_best": []} for u, t in enumerate(texts)]
        table = DESCRIPTIONS.table({c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns})
        storage.write(DESCRIPTIONS, table, f"d{layer}", **keys)


def reader() -> spacy.Language:
    """Words with vectors of their own."""
    nlp = spacy.blank("en")
    for word, vector in {"dog": (3, 0), "cup": (-3, 0), "red": (0, 1), "lines": (0, 0)}.items():
        nlp.vocab.set_vector(word, np.array(vector, np.float32))  # type: ignore[arg-type]  # thinc's own array types
    return nlp


def classes(root: Path) -> Path:
    """A folder of small random images of 3 classes."""
    rng = np.random.default_rng(0)
    for index in range(90):
        folder = root / f"class {index % 3}"
        folder.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((24, 32), Image.Resampling.BICUBIC).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def stages(photos, save_clip, tmp_path_factory) -> dict[str, dict[str, Stage]]:
    """World → its stages, each of which needs those before."""
    folder = tmp_path_factory.mktemp("few")
    for file in sorted(photos.rglob("*.png"))[::3]:
        shutil.copy(file, folder)
    (folder / "none.png").write_bytes(b"no image")
    probe = ProbeRef((str(folder),))
    clip_folder = save_clip(tmp_path_factory.mktemp("models") / "tiny-clip")
    clip, embedder = Clip(clip_folder, beam_size=4), ImageTextRef(clip_folder)

    def dissect(config: ExemplarConfig) -> Callable[[Storage], object]:
        return lambda storage: Exemplars([CNN], probe, config).run(storage, HERE)

    exemplars = {EXEMPLARS: "exemplars", POOLED: "pooled"}
    texts = ["a dog", "a house", "red"]
    photographs = {
        "exemplars": Stage(dissect(CONFIG), exemplars),
        "masks": Stage(dissect(replace(CONFIG, k=3, map_budget=0)), exemplars),
        "encodings": Stage(lambda place: run_stage(Encodings(LAYERS, ENCODER), place, HERE), {ENCODINGS: "encodings"}),
        "annotations": Stage(annotate, {}),
        "descriptions": Stage(lambda place: run_descriptions(place, LAYERS, SEARCH, HERE), {CANDIDATES: "candidates"}),
        "reranking": Stage(
            lambda place: run_stages(reranking_stages(LAYERS, SEARCH, load_captioner(place, "toy"), clip), place, HERE),
            {CANDIDATES: "candidates", ENCODINGS: "encodings"},
        ),
        "comparison": Stage(
            lambda place: find_comparison(place, models=["tiny/cnn"], labelers=["milan*"]).run(place), {}
        ),
        "training": Stage(teach, {TRAINING: "training"}),
        "tuning": Stage(tune_here, {TRIALS: "tuning"}),
        "image embeddings": Stage(
            lambda place: run_stage(ImageEmbeddings(embedder, probe), place, HERE),
            {IMAGE_EMBEDDINGS: "image_embeddings"},
        ),
        "text embeddings": Stage(lambda place: text_embeddings(place, texts, embedder, HERE), {}),
        "contrast": Stage(
            lambda place: contrast(place, probe, embedder),
            {CONTRASTS: "contrasts", CONTRAST_ENCODINGS: "contrast_encodings"},
        ),
    }
    fields = {
        "dissected": Stage(look, exemplars),
        "labels": Stage(explain, {DESCRIPTIONS: ""}),
        "clip-dissect": Stage(name, {DESCRIPTIONS: ""}),
        "scores": Stage(score, {UNIT_SCORES: "scores", VERDICTS: "verdicts"}),
        "cosy": Stage(draw, {}),
        "rating draws": Stage(draw_to_rate, {}),
    }
    scenes = {"dissected": Stage(watch, exemplars), "dnd": Stage(draw_scenes, {DRAWINGS: "dnd"})}
    found = {
        "dissected": Stage(watch, exemplars),
        "dnd-probe": Stage(find_scenes, {DRAWINGS: "dnd-probe", IMAGE_EMBEDDINGS: "image_embeddings"}),
    }
    published = {"import": Stage(bring_in(published_set(tmp_path_factory.mktemp("net") / "photos")), {})}
    told = ProbeRef((str(classes(tmp_path_factory.mktemp("classes"))),))
    words, edits = AnalysisConfig(trials=1, fractions=(0.0, 0.5), words=("red",)), EditingConfig(trials=1, most=2)
    pasting = CutAndPasteConfig(units=3, originals=3, distractors=2, targets=2)
    analysis, editing = Analysis(CLASSES, told, "four words", words), Editing(CLASSES, told, None, edits)
    adversarial = CutAndPaste(CLASSES, told, "four words", pasting)
    experiments = {
        "dissected": Stage(
            lambda place: Exemplars([CLASSES], told, ExemplarConfig(k=4, batch_size=16)).run(place, HERE), {}
        ),
        "said": Stage(say_words, {}),
        "analysis": Stage(lambda place: analysis.run(place, reader(), HERE), {}),
        "editing": Stage(lambda place: editing.run(place, HERE), {}),
        "pasting": Stage(lambda place: adversarial.run(place, reader(), HERE), {}),
    }
    return {
        "photographs": photographs,
        "fields": fields,
        "scenes": scenes,
        "found": found,
        "published": published,
        "experiments": experiments,
    }


@pytest.fixture(scope="module")
def on_threads() -> Iterator[None]:
    with connected(HERE), pytest.MonkeyPatch.context() as patched:
        patched.setattr(embeddings, "SHARD", 16)
        patched.setattr(embeddings, "CHUNK", 2)
        patched.setattr(embeddings, "FEW_TEXTS", 0)
        patched.setattr(dnd, "UNITS_PER_BLOCK", 3)
        patched.setattr(dnd, "LABELS_FOUND", 2)
        patched.setattr("milan_ray.studies.tasks.run_parallel", in_turn)
        patched.setattr(ablate, "SETS", 4)
        patched.setattr(tune, "_run_trials", try_here)
        patched.setattr(tuner, "report", lambda scores: None)
        yield


@pytest.fixture(scope="module")
def before_and_after(on_threads, stages, tmp_path_factory) -> Callable[[str, str], tuple[Path, Path, Stage]]:
    """``before_and_after(world, stage)``: the storage before the stage and after it, and the stage."""
    made: dict[tuple[str, str], tuple[Path, Path, Stage]] = {}

    def find(world: str, wanted: str) -> tuple[Path, Path, Stage]:
        before = tmp_path_factory.mktemp("empty")
        for name, stage in stages[world].items():
            if (world, name) not in made:
                after = tmp_path_factory.mktemp(name)
                shutil.copytree(before, after, dirs_exist_ok=True)
                stage.run(Storage(after))
                assert not (after / "_work").exists()
                made[world, name] = before, after, stage
            before, after, stage = made[world, name]
            if name == wanted:
                return before, after, stage
            before = after
        raise KeyError(wanted)

    return find
