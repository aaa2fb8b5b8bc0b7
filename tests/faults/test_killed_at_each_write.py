"""A job that is killed at each of its writes in turn, started again, leaves what an undisturbed one does.

Every stage runs in this process, on threads, with a storage that dies at its n-th write or removal and does nothing any
more after that, as a killed process. What happens before a write is what happens after the one before.
"""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray.tune
import spacy
import torch
from damage import damage, tables
from PIL import Image

from milan_ray.annotations.layout import write_annotations
from milan_ray.annotations.load import load
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.text import Indexer, Vocabulary
from milan_ray.config import ExemplarConfig, Resources, TrainingConfig
from milan_ray.errors import MilanError
from milan_ray.experiments.tuning import Sweep
from milan_ray.labelers.clip import Clip
from milan_ray.labelers.clip_dissect import ClipDissect
from milan_ray.labelers.dnd.labeler import DescribeAndDissect
from milan_ray.models.generators import GeneratorRequest
from milan_ray.models.image_captions import ImageCaptionerRequest
from milan_ray.models.image_text import ImageTextRequest
from milan_ray.pipelines import ablate, cut_and_paste, dnd, embeddings, train, tune
from milan_ray.pipelines.analyze import AnalysisConfig, run_analysis
from milan_ray.pipelines.annotations_import import run_import
from milan_ray.pipelines.captioners import EncoderRequest, save_captioner
from milan_ray.pipelines.clip_dissect import run_clip_dissect
from milan_ray.pipelines.cluster import connected
from milan_ray.pipelines.compare import run_comparison
from milan_ray.pipelines.cosy import CosyConfig, run_cosy
from milan_ray.pipelines.cut_and_paste import PastingConfig, run_pasting
from milan_ray.pipelines.describe import Search, run_descriptions
from milan_ray.pipelines.dnd import DndConfig, SummariserRequest, run_dnd
from milan_ray.pipelines.edit import EditingConfig, run_editing
from milan_ray.pipelines.embeddings import run_image_embeddings, text_embeddings
from milan_ray.pipelines.encodings import run_encodings
from milan_ray.pipelines.exemplars import Dissection, run_exemplars
from milan_ray.pipelines.label import LabelConfig, run_labels
from milan_ray.pipelines.requests import ModelRequest, ProbeRequest
from milan_ray.pipelines.rerank import run_reranking
from milan_ray.pipelines.score import ScoreConfig, described_layers, run_scores
from milan_ray.schema import (
    ANNOTATIONS,
    CANDIDATES,
    DESCRIPTIONS,
    DRAWINGS,
    ENCODINGS,
    EXEMPLARS,
    IMAGE_EMBEDDINGS,
    POOLED,
    RUNS,
    TRAINING,
    TRIALS,
    UNIT_SCORES,
    Noun,
)
from milan_ray.storage import CONFIG_KEY, Storage

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
TINY, FLAGS, COLOURS = (str(PLUGINS / f"{name}.py") for name in ("tiny_models", "flags", "colours"))
HERE = Resources()
CNN = ModelRequest("tiny/cnn", layers=("0", "6"), plugins=(TINY,))
ENCODER = EncoderRequest("tiny", plugins=(TINY,))
LAYERS = {"tiny/cnn": CNN.layers}
SEARCH = Search("toy", beam_size=4, length=4, lam=0.5)
CONFIG = ExemplarConfig(k=2, batch_size=16, shard_size=20, pooled=True)
WATCHER = ModelRequest("flags/watcher", layers=("seen",), plugins=(FLAGS,))
FIELDS = ProbeRequest(("flags",), plugins=(FLAGS,))
FEW = ExemplarConfig(k=2, quantile=0.95, batch_size=32, shard_size=64, pooled=True)
TRUTH = ImageTextRequest("flags/truth")
SCORING = ScoreConfig(share=0.9, top=0.2, retrieved=10)
COLOUR_MODEL = ModelRequest("colours/watcher", plugins=(COLOURS,))
SCENES = ProbeRequest(("colours",), plugins=(COLOURS,))
SHOTS = ExemplarConfig(k=3, batch_size=16, shard_size=96, pooled=True)


class Killed(BaseException):
    """The process is gone: no handler of errors sees this."""


class Dying(Storage):
    """Dies at its n-th write or removal, which is done by half, and takes no other after that.

    Attributes:
        done: Writes and removals so far.
    """

    def __init__(self, root: str, last: int, error: type[BaseException] = Killed) -> None:
        super().__init__(root)
        self._last, self.done, self._lock, self._error = last, 0, threading.Lock(), error

    def __reduce__(self):
        raise AssertionError("nothing here travels to another process")

    @contextmanager
    def _write(self, path: str, half: Callable[[Path], None]) -> Iterator[None]:
        with self._lock:  # one at a time, so that none is half done when another one dies
            self.done += 1
            if self.done == self._last and self._error is Killed:
                half(Path(self.root, path))
            if self.done >= self._last:
                raise self._error("cannot write: no space left on device; choose another --storage.")
            yield

    @property
    def died(self) -> bool:
        return self.done >= self._last

    def put(self, path, data):
        with self._write(path, _torso):
            super().put(path, data)

    def write_stream(self, noun, pieces, config, metadata, **keys):
        everything = list(pieces)  # what its rows write comes first
        with self._write(self.path(noun, **keys), _torso):
            super().write_stream(noun, everything, config, metadata, **keys)

    def remove(self, folder):
        if Path(self.root, folder).exists():
            with self._write(folder, _remove_one):
                super().remove(folder)

    def remove_file(self, path):
        with self._write(path, lambda path: None):
            super().remove_file(path)


def _torso(path: Path) -> None:
    """What a kill between the first byte and the rename leaves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / f".{path.name}.torso.tmp").write_bytes(b"PAR1")


def _remove_one(folder: Path) -> None:
    next(path for path in sorted(folder.rglob("*")) if path.is_file()).unlink()


@dataclass(frozen=True)
class Stage:
    """A job.

    Attributes:
        run: What to do in a storage.
        tables: Table → stage of the row of runs that each of its partitions has.
    """

    run: Callable[[Storage], object]
    tables: dict[Noun, str]


def captioner() -> Captioner:
    indexer = Indexer(Vocabulary.build([["the red house", "dark areas"], ["a dog", "dogs on grass"]]))
    torch.manual_seed(0)
    words = len(indexer.vocabulary)
    decoder = Decoder(DecoderConfig(words, feature_size=10, embedding_size=8, hidden_size=12))
    return Captioner(indexer, decoder, LanguageModel(LMConfig(words, 8, 12)), "tiny", None, 4, 4, 0.5)


def annotate(storage: Storage) -> None:
    """Gives the toy captioner, and what people say of the units of the first layer."""
    save_captioner(storage, "toy", captioner(), "A toy.")
    keys = {"source": "people", "model": "tiny/cnn", "layer": "0"}
    texts = ["a red dog", "dark house", "the dark dog", "red house", "a house", "dogs"]
    columns = {key: [value] * len(texts) for key, value in keys.items()}
    columns |= {"unit": range(len(texts)), "annotator": ["1"] * len(texts), "text": texts}
    storage.write(ANNOTATIONS, ANNOTATIONS.table(columns), "said", **keys)


def train_here(storage: Storage) -> None:
    """A training as a task does it, here."""
    config = TrainingConfig(max_epochs=2, learning_rate=0.01, decoder_batch_size=4, lm_batch_size=4, hold_out=0.2)
    job = train.TrainingJob("taught", "people", (("tiny/cnn", "0"),), ENCODER, config, train.Sizes(4, 6))
    recipe = train._due(storage, job)
    if recipe is not None:
        done, said = train._train_here(train._Little(storage, job, recipe))
        assert done, said


def look(storage: Storage) -> Dissection:
    return run_exemplars(storage, [WATCHER], FIELDS, FEW, HERE)


def explain(storage: Storage) -> None:
    assert run_labels(storage, look(storage), [WATCHER], FIELDS, FEW, LabelConfig(), HERE) == {}


def name(storage: Storage) -> None:
    layers = {"flags/watcher": ("seen",)}
    run_clip_dissect(storage, layers, FIELDS, ClipDissect(("red", "green", "blue", "left")), TRUTH, HERE)


def score(storage: Storage) -> None:
    run_scores(storage, described_layers(storage, ["flags/watcher"]), FIELDS, TRUTH, SCORING, HERE)


def draw(storage: Storage) -> None:
    described = described_layers(storage, ["flags/watcher"])[:1]
    run_cosy(storage, described, FIELDS, [WATCHER], GeneratorRequest("flags/fields"), CosyConfig(4), SCORING, HERE)


def watch(storage: Storage) -> Dissection:
    return run_exemplars(storage, [COLOUR_MODEL], SCENES, SHOTS, HERE)


def describe_and_dissect(storage: Storage) -> None:
    how = DndConfig(
        DescribeAndDissect("topk-squared-mean"), ImageCaptionerRequest("colours/names"), SummariserRequest(),
        GeneratorRequest("world/painter"), ImageTextRequest("colours/grid"), images=3, crops=1, drawn=2,
        plugins=(COLOURS,),
    )  # fmt: skip
    assert run_dnd(storage, watch(storage), [COLOUR_MODEL], SCENES, SHOTS, how, HERE) == {}


def tune_here(storage: Storage) -> None:
    """A sweep whose trials run here, where Ray Tune would start a process for each."""
    sweep = Sweep((2,), (0.0, 0.5), ("greedy", "rerank"), (4,), "bleu-2", samples=10)
    tune.run_tuning(storage, tune.TuningJob("sweep", "toy", "people", (("tiny/cnn", "0"),), sweep), HERE)


def try_here(storage: Storage, task: tune._Task, trials: list[tune.Trial], resources: Resources) -> None:
    for trial in trials:
        tune._run_trial({"trial": asdict(trial)}, task)


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


CLASSES = ModelRequest("tiny/cnn", layers=("0", "2"), plugins=(TINY,))
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
        nlp.vocab.set_vector(word, np.array(vector, np.float32))
    return nlp


@pytest.fixture(scope="module")
def stages(photos, save_clip, tmp_path_factory) -> dict[str, dict[str, Stage]]:
    """World → its stages, each of which needs those before."""
    folder = tmp_path_factory.mktemp("few")
    for file in sorted(photos.rglob("*.png"))[::3]:
        shutil.copy(file, folder)
    (folder / "none.png").write_bytes(b"no image")
    probe = ProbeRequest((str(folder),))
    clip_folder = save_clip(tmp_path_factory.mktemp("models") / "tiny-clip")
    clip, embedder = Clip(clip_folder, beam_size=4), ImageTextRequest(clip_folder)

    def dissect(config: ExemplarConfig) -> Callable[[Storage], object]:
        return lambda storage: run_exemplars(storage, [CNN], probe, config, HERE)

    exemplars = {EXEMPLARS: "exemplars", POOLED: "pooled"}
    texts = ["a dog", "a house", "red"]
    photographs = {
        "exemplars": Stage(dissect(CONFIG), exemplars),
        "masks": Stage(dissect(replace(CONFIG, k=3, map_budget=0)), exemplars),
        "encodings": Stage(lambda place: run_encodings(place, LAYERS, ENCODER, HERE), {ENCODINGS: "encodings"}),
        "annotations": Stage(annotate, {}),
        "descriptions": Stage(lambda place: run_descriptions(place, LAYERS, SEARCH, HERE), {CANDIDATES: "candidates"}),
        "reranking": Stage(
            lambda place: run_reranking(place, LAYERS, SEARCH, clip, HERE),
            {CANDIDATES: "candidates", ENCODINGS: "encodings"},
        ),
        "comparison": Stage(lambda place: run_comparison(place, models=["tiny/cnn"], labelers=["milan*"]), {}),
        "training": Stage(train_here, {TRAINING: "training"}),
        "tuning": Stage(tune_here, {TRIALS: "tuning"}),
        "image embeddings": Stage(
            lambda place: run_image_embeddings(place, probe, embedder, HERE), {IMAGE_EMBEDDINGS: "image_embeddings"}
        ),
        "text embeddings": Stage(lambda place: text_embeddings(place, texts, embedder, HERE), {}),
    }
    fields = {
        "dissected": Stage(look, exemplars),
        "labels": Stage(explain, {DESCRIPTIONS: ""}),
        "clip-dissect": Stage(name, {DESCRIPTIONS: ""}),
        "scores": Stage(score, {UNIT_SCORES: "scores"}),
        "cosy": Stage(draw, {}),
    }
    scenes = {"dissected": Stage(watch, exemplars), "dnd": Stage(describe_and_dissect, {DRAWINGS: "dnd"})}
    published = {"import": Stage(bring_in(published_set(tmp_path_factory.mktemp("net") / "photos")), {})}
    told = ProbeRequest((str(classes(tmp_path_factory.mktemp("classes"))),))
    words, found = AnalysisConfig(trials=1, fractions=(0.0, 0.5), words=("red",)), EditingConfig(trials=1, most=2)
    pasting = PastingConfig(units=3, originals=3, distractors=2, targets=2)
    experiments = {
        "dissected": Stage(
            lambda place: run_exemplars(place, [CLASSES], told, ExemplarConfig(k=4, batch_size=16), HERE), {}
        ),
        "said": Stage(say_words, {}),
        "analysis": Stage(lambda place: run_analysis(place, CLASSES, told, reader(), "four words", words, HERE), {}),
        "editing": Stage(lambda place: run_editing(place, CLASSES, told, None, found, HERE), {}),
        "pasting": Stage(lambda place: run_pasting(place, CLASSES, told, reader(), "four words", pasting, HERE), {}),
    }
    return {
        "photographs": photographs,
        "fields": fields,
        "scenes": scenes,
        "published": published,
        "experiments": experiments,
    }


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
def on_threads() -> Iterator[None]:
    with connected(HERE), pytest.MonkeyPatch.context() as patched:
        patched.setattr(embeddings, "SHARD", 16)
        patched.setattr(embeddings, "CHUNK", 2)
        patched.setattr(embeddings, "FEW_TEXTS", 0)
        patched.setattr(dnd, "UNITS", 3)
        patched.setattr(ablate, "run_parallel", in_turn)
        patched.setattr(cut_and_paste, "run_parallel", in_turn)
        patched.setattr(ablate, "SETS", 4)
        patched.setattr(tune, "_try", try_here)
        patched.setattr(ray.tune, "report", lambda scores: None)
        yield


@pytest.fixture(scope="module")
def undisturbed(on_threads, stages, tmp_path_factory) -> Callable[[str, str], tuple[Path, Path, Stage]]:
    """``undisturbed(world, stage)``: the storage before the stage and after it, and the stage."""
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


def public(root: Path) -> dict[str, bytes]:
    """All files, but the table of runs and what jobs ask of each other's views, which is forgotten after a while."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {path: data for path, data in found.items() if not path.startswith("runs/") and "/wanted/" not in path}


def runs(root: Path) -> dict[str, dict[str, object]]:
    """The table of runs, without moments and what something took."""
    storage = Storage(root)
    return {
        storage.path(RUNS, **keys): {
            name: value
            for name, value in storage.read(RUNS, **keys).to_pylist()[0].items()
            if name in ("stage", "run", "model", "layer", "rows", "versions")
        }
        for keys in storage.partitions(RUNS)
    }


def assert_recorded(root: Path, tables: dict[Noun, str]) -> None:
    """Every table that there is has its row of runs."""
    storage = Storage(root)
    recorded = {(keys["stage"], keys["run"]) for keys in storage.partitions(RUNS)}
    for noun, stage in tables.items():
        for keys in storage.partitions(noun):
            made = storage.metadata(noun, **keys)
            assert made is not None
            assert (stage or keys["labeler"], made[CONFIG_KEY]) in recorded, (noun.name, keys)


FAST = {
    "photographs": (
        "exemplars",
        "masks",
        "encodings",
        "descriptions",
        "comparison",
        "training",
        "tuning",
        "image embeddings",
        "text embeddings",
    ),
    "fields": ("labels", "clip-dissect", "scores", "cosy"),
    "published": ("import",),
}
LONG = {"photographs": ("reranking",), "scenes": ("dnd",), "experiments": ("analysis", "editing", "pasting")}
EVERY = [(world, name) for world, names in FAST.items() for name in names]
EVERY += [pytest.param(world, name, marks=pytest.mark.slow) for world, names in LONG.items() for name in names]


@pytest.mark.parametrize(("world", "name"), EVERY)
def test_f1_f6_killed_at_each_write_in_turn(undisturbed, tmp_path, world, name):
    before, after, stage = undisturbed(world, name)
    expected, recorded = public(after), runs(after)
    for last in count(1):
        root = tmp_path / str(last)
        shutil.copytree(before, root)
        dying = Dying(str(root), last)
        try:
            stage.run(dying)
        except Killed:
            assert_recorded(root, stage.tables)
        else:
            assert not dying.died, "a kill was swallowed"
            break
        stage.run(Storage(root))
        found = public(root)
        assert found.keys() == expected.keys(), (last, found.keys() ^ expected.keys())
        assert [path for path in expected if found[path] != expected[path]] == [], last
        assert runs(root) == recorded, last
        assert not (root / "_work").exists(), last
        shutil.rmtree(root)
    assert last > 3


@pytest.mark.parametrize(("world", "name"), EVERY)
def test_e_f6_work_is_gone_whichever_way_the_job_before_ended(undisturbed, tmp_path, world, name):
    """Full disk, Ctrl-C, and work that a job left behind whose tables somebody else has made since."""
    before, after, stage = undisturbed(world, name)
    shutil.copytree(before, tmp_path / "counted")
    counting = Dying(str(tmp_path / "counted"), 10**9)
    stage.run(counting)
    assert not (tmp_path / "counted/_work").exists()
    for error in (MilanError, KeyboardInterrupt):
        root = tmp_path / error.__name__
        shutil.copytree(before, root)
        with suppress(error, AssertionError):  # or models that failed, which their stages here take for a defect
            stage.run(Dying(str(root), counting.done // 2 + 1, error))
        left = root / "_work"
        if left.exists():
            done = tmp_path / f"{error.__name__} done"
            shutil.copytree(after, done)
            shutil.copytree(left, done / "_work")
            stage.run(Storage(done))
            assert not (done / "_work").exists(), "the tables were up to date"
            assert public(done) == public(after)
        stage.run(Storage(root))
        assert not left.exists()
        assert public(root) == public(after)


def judged(files: dict[str, bytes], damaged: Path) -> dict[str, object]:
    """What must be as ever where one file is damaged.

    Not what a label cost, which follows the tables on its way, and leaves out, and says so, what is damaged of them;
    nor the hash of a comparison, of which costs are a part.
    """
    kept = {path: data for path, data in files.items() if path != str(damaged) and "comparison%3A cost" not in path}
    return {
        path: repr(pq.read_table(io.BytesIO(data)).to_pylist()) if "comparison%3A" in path else data
        for path, data in kept.items()
    }


STUDIED = [
    ("photographs", "comparison"),
    ("photographs", "tuning"),
    ("photographs", "training"),
    *(pytest.param(world, name, marks=pytest.mark.slow) for world in ("experiments", "scenes") for name in LONG[world]),
]


@pytest.mark.parametrize(
    "kind",
    [
        "other_pages",
        "other_columns",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("emptied", "cut", "other_footer")),
    ],
)
@pytest.mark.parametrize(("world", "name"), STUDIED)
def test_f2_damaged_tables_of_studies_are_made_anew_or_named(undisturbed, tmp_path, world, name, kind):
    """Of every table there is, before the stage and after it: what comes out is right, or a sentence."""
    before, after, stage = undisturbed(world, name)
    expected = public(after)
    for number, where in enumerate((before, after)):
        for noun, file in tables(Storage(where)).items():
            path = file.relative_to(where)
            root = tmp_path / f"{number} {noun}"
            shutil.copytree(where, root)
            damage(root / path, kind)
            try:
                stage.run(Storage(root))
            except MilanError as error:
                assert str(path) in str(error) and "is damaged" in str(error) and "delete it" in str(error), error
            except AssertionError as error:  # the models that failed, and why
                assert str(path) in str(error) and "delete it" in str(error), error
            else:
                assert judged(public(root), path) == judged(expected, path), noun
            shutil.rmtree(root)
