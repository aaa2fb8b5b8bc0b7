"""What the documents say to type: every command parses and is run or listed, imports are there, marked blocks run."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import runpy
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from toys import TEXTS, toy_captioner

from milan_ray import cli
from milan_ray.benchmarks.report import Zoo, write_zoo
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.text import Vocabulary
from milan_ray.schema import ANNOTATIONS
from milan_ray.stages.captioners import save_captioner
from milan_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "BENCHMARKS.md", "CHANGELOG.md")),
    ROOT / "tune_configs/README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
]
TUTORIALS = ("notebook", "own-model", "annotations")
"""Pages with blocks to run, in an order in which each finds what it needs."""

BLOCK = re.compile(r"^(<!-- run -->\n)?```([\w{}-]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:^|[\s`])(?:python -m jobs\.|milan-ray )(?P<verb>[a-z]+)\b(?P<rest>.*)")
ELSEWHERE = {
    "--address", "--working-dir", "--runtime-env-json", "--local-dir", "--head", "--only", "--help", "--upgrade",
    "--force-reinstall", "--no-deps",
}  # fmt: skip
"""Options of Ray, pip and others that the documents name, and of every program."""


ON_THE_DEMO = "(?!edit|.*world/(clip|superposed)|.*milan-contrast).* world/(resnet|planted|probe)"

NOT_RUN = {
    "models --conformance": "a quarter of an hour: tests/benchmarks/test_conformance.py runs a sample",
    "demo|paper|benchmark": "minutes by themselves: tests/test_demo.py and tests/benchmarks run them",
    "(describe|plan) --zoo": "dozens of networks: tests/stages/test_zoo.py runs a small zoo",
    "annotations import base": "a download: tests/stages/test_published_sets.py imports a set of its own",
    "describe .*--decoder own": "a captioner that the tutorial trains: the marked blocks run it",
    "score .*--clip photos/conse": "descriptions by that captioner: tests/stages/test_scores.py has others",
    "annotations import units.csv": "text about networks of one's own: tests/stages/test_own_text.py has some",
    "annotations (collect|answers)": "people's answers: tests/stages/test_collection_pipeline.py makes some",
    "annotations statistics annotations.csv": "a pipeline of spaCy that has to be downloaded",
    "train|generalize|baselines --model alexnet|tune (?!.*world/).*": "training and trials: tests/pipelines has them",
    "edit .*-text|label .*world/clip": "networks that jobs.paper or the demo with --clip train, for minutes",
    "(label|score|features fit) .*world/superposed": "a network that the demo with --superposed trains, for a minute",
    ON_THE_DEMO: "networks that the demo trains: tests/test_demo.py runs these, too",
    "describe .*--milan base.clip|dnd --model resnet50": "big models to download: tests/pipelines has tiny ones",
    "dnd .*--llm smollm2": "a language model of 98 MB: tests/models/test_chat.py reads a tiny one",
    "label .*(--segmentation deeplab|/labelled)": "a network of one's own: tests/examples/test_label_maps.py has one",
    "describe .*--contrast|(compare|score) .*milan-contrast": "what the demo with --clip trains, for minutes",
    "label --model resnet18": "Broden's concept maps: tests/stages/test_label_pipeline.py has some",
    "(analyze|paste) --model resnet18": "ImageNet's classes: tests/pipelines has other ones",
}
"""What is parsed and not run, as patterns of how the commands begin, and why. All other commands are run."""

READING = {"annotations", "audit", "compare", "diff", "export", "report", "search", "status"}
"""Verbs that read tables, and here do so in a storage that has them of networks that never ran."""

NETWORKS = ("resnet18/imagenet", "resnet18/imagenet-blurred", "alexnet/imagenet", "mine")
"""Networks of those tables."""

WORDS = [f"{colour}{thing}" for colour in ("red", "green", "blue", "dark", "pale") for thing in "abcdefghijklmnopqrst"]
"""Most words of the captioner here: whatever it says has some, and is found by them."""


def blocks(page: Path) -> Iterator[tuple[bool, str, str]]:
    """(to be run, language, text) of every fenced block."""
    for run, language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        yield bool(run), language, text


def commands(text: str) -> Iterator[list[str]]:
    """Every command line of this project in some lines of a shell, without comments and redirections."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        found = COMMAND.search(line)
        if found:
            rest = re.split(r"\s(?:\||&&|;|2?>)\s", found["rest"])[0]
            yield [found["verb"], *shlex.split(rest, comments=True)]


def written() -> list[tuple[str, list[str]]]:
    """Every command of every page: in blocks of a shell, and between backticks as a whole command."""
    found = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        text = page.read_text(encoding="utf-8")
        shells = [block for _, language, block in blocks(page) if language in ("", "sh", "bash")]
        inline = [one for one in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)) if COMMAND.match(one)]
        found += [(name, command) for part in (*shells, *inline) for command in commands(part)]
    return found


WRITTEN = written()
PARSER = cli.build_parser()


def in_part(command: list[str]) -> bool:
    """Whether it is no command to type: it has a placeholder, or is the name of a job alone that wants more."""
    names = [word for word in command if not re.fullmatch("[A-Z]{4,}|[A-Z]", word)]
    return any("…" in word for word in command) or len(names) < len(command) or command in (["plan"], ["paper"])


def why_not(command: list[str]) -> list[str]:
    """The patterns of :data:`NOT_RUN` that a command is meant by."""
    return [pattern for pattern in NOT_RUN if re.match(rf"({pattern})(?![\w-])", " ".join(command))]


def adapted(command: list[str]) -> list[str]:
    """A command with what is here in place of what it names, and with as little work as will do."""
    line = " ".join(word.replace(" ", "\0") for word in command)
    reads = command[0] in READING or not {"--probe", "--config"} & {*command}
    for pattern, here in {
        r"(--storage) \S+": rf"\1 {'tables' if reads else 'made'}",
        r"(--probe|--test) \S+": r"\1 photos",
        r"(--clip) \S+": r"\1 clip",
        r"(--milan|--decoder) (\S+/)?(\w+)": r"--decoder \3",
        r"(--annotations|--source) \w+": r"\1 crowd",
        r"(--report) \S+": r"\1 elsewhere",
        r" --download| --weights \S+\.pth": "",
        r"^(describe|label) (?=.*/imagenet .*--probe)": r"\1 --weights random --units 0,1 --k 3 ",
        r"^exemplars (?=.*/imagenet)": "exemplars --weights random --layers layer4 --k 3 ",
        r"alexnet/imagenet (?=--dry-run)": "mine ",
        r"^(describe .*--model )(alex|squeeze)net[^ ]* (?=.*--probe)": r"\1resnet18/imagenet --layers layer4 ",
        r"^edit ": f"edit --trials 1 --most 2 --words {' '.join(WORDS)} ",
        r"^plan (.*)--model \S+": r"plan --sample 2 --plugin mine.py \1--model mine",
    }.items():
        line = re.sub(pattern, here, line)
    return [word.replace("\0", " ") for word in line.split()]


def typed() -> list[list[str]]:
    """Every command that is whole, the first of those that differ by places alone, in the order of the pages."""
    found: dict[tuple[str, ...], list[str]] = {}
    for _, command in WRITTEN:
        if not in_part(command):
            found.setdefault(tuple(adapted(command)), command)
    return list(found.values())


TYPED = typed()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages show, by the name in their first line."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "tune_configs").symlink_to(ROOT / "tune_configs")
    for page in PAGES:
        for _, language, text in blocks(page):
            name = re.match(r"# ([\w-]+\.(?:py|yaml))\n", text)
            if language in ("python", "yaml") and name:
                (folder / name.group(1)).write_text(text, encoding="utf-8")
    return folder


def leaf(verb: list[str]) -> argparse.ArgumentParser:
    """The parser of a verb, and of its action where it has some."""
    parser: argparse.ArgumentParser = PARSER
    for word in verb:
        below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not below or word not in below[0].choices:
            break
        parser = below[0].choices[word]
    return parser


def every_option() -> set[str]:
    def options(parser: argparse.ArgumentParser) -> set[str]:
        found = set(parser._option_string_actions)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= set().union(*map(options, action.choices.values()))
        return found

    return options(PARSER)


def test_documents_have_commands() -> None:
    assert len(WRITTEN) > 60
    assert {command[0] for _, command in WRITTEN} >= {
        "demo",
        "exemplars",
        "describe",
        "train",
        "tune",
        "doctor",
        "plan",
    }


@pytest.mark.parametrize(("page", "command"), WRITTEN, ids=[f"{page}: {' '.join(one)}"[:90] for page, one in WRITTEN])
def test_every_command_is_one_that_there_is(page, command, place, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    assert command[0] in cli.VERBS, f"{page} names jobs.{command[0]}"
    if in_part(command):
        # In part: a placeholder, or the name of the job alone. Its options must be there all the same.
        known = set(leaf(command)._option_string_actions)
        assert {word.partition("=")[0] for word in command if word.startswith("--")} <= known
        return
    try:
        PARSER.read(command)
    except SystemExit as error:
        assert error.code == 0, f"{page}: {capsys.readouterr().err}"


def test_options_named_in_the_text_are_there() -> None:
    known = every_option() | ELSEWHERE
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        text = BLOCK.sub("", page.read_text(encoding="utf-8"))
        named = {
            match
            for code in re.findall(r"`([^`\n]+)`", text)
            for match in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)
        }
        assert named <= known, f"{page.name}: {sorted(named - known)}"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_imports_of_the_documents_are_there(page) -> None:
    for _, language, text in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("milan_ray"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "milan_ray":
                assert hasattr(importlib.import_module("milan_ray"), node.attr)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_between_pages_lead_somewhere(page) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links {target}"
        if anchor and file.suffix == ".md":
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name} links {target}"


def test_every_page_is_in_the_contents() -> None:
    trees = "".join(text for _, language, text in blocks(ROOT / "docs/index.md") if language == "{toctree}")
    listed = {line for line in trees.splitlines() if line and not line.startswith(":")}
    pages = {
        str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES if page.is_relative_to(ROOT / "docs")
    }
    assert listed == pages - {"index"}


def test_table_reference_is_that_of_the_schemas() -> None:
    made = runpy.run_path(str(ROOT / "docs/make_tables.py"))["page"]()
    assert (ROOT / "docs/tables.md").read_text(encoding="utf-8") == made, "run: python docs/make_tables.py"


def test_citation_is_whole() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "message", "authors", "license"} <= found.keys()
    assert importlib.import_module("milan_ray").__version__ == found["version"]


def captioner() -> Captioner:
    """An untrained captioner over an untrained ResNet-18: what tutorials need to run, not to make sense."""
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    vocabulary = Vocabulary.build([*TEXTS, [" ".join(WORDS)]])
    return toy_captioner("resnet18", state, vocabulary=vocabulary, sizes=(1024, 8, 12), length=5, beam_size=6, lam=0.5)


@pytest.mark.slow
def test_marked_blocks_run(place, photos, monkeypatch, capsys) -> None:
    """The blocks of the tutorials that need nothing but a folder of images and a captioner, one after the other."""
    monkeypatch.chdir(place)
    for file in sorted(photos.rglob("*.png"))[::5]:
        folder = place / "photos" / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)
    save_captioner(Storage(place / "results/demo"), "world", captioner(), "Untrained.")
    ran = 0
    for tutorial in TUTORIALS:
        names: dict[str, object] = {}
        for number, (run, language, text) in enumerate(blocks(ROOT / f"docs/tutorials/{tutorial}.md")):
            if not run:
                continue
            ran += 1
            if language == "python":
                exec(compile(text, f"{tutorial}.md, block {number + 1}", "exec"), names)
                continue
            lines = list(commands(text))
            assert lines, f"{tutorial}.md, block {number + 1} has no command"
            for command in lines:
                # Ray's workers may have started in another folder.
                command = [str(place / word) if word.endswith(".py") else word for word in command]
                assert cli.main(command) == 0, f"{tutorial}.md: {command}: {capsys.readouterr().err}"
    assert ran >= 8
    assert (
        (place / "run/report/index.html").exists() and (place / "exported").is_dir() and (place / "unit-3.png").exists()
    )


@pytest.fixture(scope="module")
def workplace(
    ray_session: None,
    place: Path,
    photos: Path,
    save_clip: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with what commands name: photographs, captioners, a small CLIP, one storage of tables, one without."""
    folder = tmp_path_factory.mktemp("workplace")
    for shown in ("mine.py", "night.yaml"):
        shutil.copy(place / shown, folder)
    (folder / "tune_configs").symlink_to(ROOT / "tune_configs")
    for file in sorted(photos.rglob("*.png"))[::10]:
        (folder / "photos" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / "photos" / file.parent.name)
    save_clip(folder / "clip")
    (folder / "words.txt").write_text("dogs\ngrass\nred house\n")
    night = yaml.safe_load((folder / "night.yaml").read_text())
    here = {
        "storage": "made",
        "model": ["mine"],
        "plugin": str(folder / "mine.py"),
        "probe": "photos",
        "decoder": "base",
    }
    del night["milan"]  # a download
    (folder / "night.yaml").write_text(yaml.safe_dump({**night, **here, "beam-size": 5}))
    tables = Storage(folder / "tables")
    write_zoo(tables, Zoo(NETWORKS, (6, 5, 4, 9), 12, 24, 3, 4))
    for model in NETWORKS:
        keys = {"source": "crowd", "model": model, "layer": "layer1"}
        rows = {"unit": [1, 1, 2], "annotator": ["A", "B", "A"], "text": ["red dogs", "dogs", "faces"]}
        rows |= {name: [value] * 3 for name, value in keys.items()}
        tables.write(ANNOTATIONS, ANNOTATIONS.table(rows), "crowd", **keys)
    for storage in (tables, Storage(folder / "made")):
        for name in ("base", "world"):
            save_captioner(storage, name, captioner(), "Untrained.")
    return folder


@pytest.mark.parametrize("command", [one for one in TYPED if not why_not(one)], ids=" ".join)
@pytest.mark.slow
def test_every_command_that_can_be_run_here_is_run(command, workplace, monkeypatch, capsys) -> None:
    """In the order of the pages: each finds what those before it have made."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("MILAN_RESULTS_DIR", str(workplace / "tables"))
    # Ray's workers may have started in another folder.
    status = cli.main([str(workplace / word) if word == "mine.py" else word for word in adapted(command)])
    assert status == 0, capsys.readouterr().err


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_every_pattern_of_what_is_not_run_means_some_command(pattern) -> None:
    assert any(pattern in why_not(command) for command in TYPED)


def test_no_command_is_left_out_for_two_reasons_and_most_are_run() -> None:
    reasons = [len(why_not(command)) for command in TYPED]
    assert max(reasons) == 1
    assert reasons.count(0) > 40
