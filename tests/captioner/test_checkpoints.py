import copy
import functools
import operator
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import spacy
import torch
import torchvision
from confection import Config

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import (
    CONFIG,
    WEIGHTS,
    digest,
    export_reference,
    export_reference_lm,
    from_bytes,
    lm_digest,
    load_reference,
    load_reference_lm,
    read_pickled,
    to_bytes,
)
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.text import Indexer, Vocabulary
from milan_ray.errors import MilanError


def test_bytes_round_trip_keeps_every_weight_and_every_answer(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    state = {"conv1.weight": torch.arange(3.0)}
    tiny = Captioner(tiny.indexer, tiny.decoder, tiny.lm, "resnet18", state, length=7, beam_size=4, lam=0.3)
    copy = from_bytes(to_bytes(tiny))
    assert (copy.length, copy.beam_size, copy.lam, copy.encoder_name) == (7, 4, 0.3, "resnet18")
    assert copy.encoder_state is not None and torch.equal(copy.encoder_state["conv1.weight"], state["conv1.weight"])
    assert to_bytes(copy) == to_bytes(tiny)
    assert copy.describe(tiny_features) == tiny.describe(tiny_features)


def test_from_bytes_loads_neither_torchs_compiler_nor_spacy_nor_draws_weights(tiny: Captioner, tmp_path: Path) -> None:
    """They cost every process that reads a captioner more than the captioner does."""
    for name, data in to_bytes(tiny).items():
        (tmp_path / name).write_bytes(data)
    script = """
import sys
from pathlib import Path
import torch
from milan_ray.captioner.checkpoints import from_bytes
before = torch.get_rng_state()
captioner = from_bytes({file.name: file.read_bytes() for file in Path(sys.argv[1]).iterdir()})
assert {tensor.device.type for tensor in captioner.decoder.state_dict().values()} == {"cpu"}
assert all(weight.requires_grad for weight in captioner.decoder.parameters())
assert torch.equal(torch.get_rng_state(), before)
print([name for name in ("torch._dynamo", "sympy", "spacy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_digest_changes_with_a_weight_and_with_nothing_else(tiny: Captioner) -> None:
    before, lm_before = digest(tiny), lm_digest(tiny)
    assert digest(from_bytes(to_bytes(tiny))) == before
    with torch.no_grad():
        tiny.decoder.output[1].get_parameter("bias")[0] += 1
    assert digest(tiny) != before
    assert lm_digest(tiny) == lm_before


def test_from_bytes_without_language_model_has_none(tiny: Captioner) -> None:
    copy = from_bytes(to_bytes(Captioner(tiny.indexer, tiny.decoder, None, "resnet18")))
    assert copy.lm is None and copy.encoder_state is None and lm_digest(copy) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: {CONFIG: files[CONFIG]}, "is missing"),
        (lambda files: {**files, CONFIG: b"{"}, "not a captioner"),
        (lambda files: {**files, WEIGHTS: files[WEIGHTS][:100]}, "is damaged"),
        (lambda files: {**files, WEIGHTS: files[WEIGHTS][:-1] + b"?"}, "is damaged, or not what config.json is of"),
        (lambda files: {**files, CONFIG: files[CONFIG].replace(b'"format": 1', b'"format": 99')}, "format 99"),
        (
            lambda files: {**files, CONFIG: files[CONFIG].replace(b'"hidden_size": 7', b'"hidden_size": 8')},
            "do not fit",
        ),
        (
            lambda files: {**files, CONFIG: files[CONFIG].replace(b'"hidden_size": 7', b'"hidden_size": -7')},
            "not a captioner",
        ),
        (lambda files: {**files, CONFIG: b"[]"}, "not a captioner"),
    ],
)
def test_from_bytes_damaged_files_are_refused(
    tiny: Captioner, damage: Callable[[dict[str, bytes]], dict[str, bytes]], message: str
) -> None:
    with pytest.raises(MilanError, match=message):
        from_bytes(damage(to_bytes(tiny)))


class Evil:
    """Calls something with some arguments wherever it is unpickled without care."""

    def __init__(self, call: Callable, *arguments: object) -> None:
        self.reduced = call, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


def write_pickle(path: Path, content: bytes, **storages: bytes) -> None:
    """A torch file made by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", content)
        for key, data in storages.items():
            archive.writestr(f"evil/data/{key}", data)


@pytest.mark.parametrize(
    ("call", "code", "name"),
    [
        (os.system, "touch {}", r"\w+\.system"),
        (eval, "open({!r}, 'w')", r"\w+\.eval"),
        (exec, "open({!r}, 'w')", r"\w+\.exec"),
        (torch.load, "{}", r"torch\.\w+\.load"),
    ],
)
def test_load_reference_malicious_call_anywhere_is_refused_and_runs_nothing(
    tmp_path: Path, call: Callable, code: str, name: str
) -> None:
    witness, file = tmp_path / "witness", tmp_path / "evil.pth"
    evil = Evil(call, code.format(str(witness)))
    tokenize = {"properties": {"nlp": ({"nlp": {"lang": "en"}}, evil)}, "children": {}}
    for content in (
        evil,
        {"properties": evil, "state_dict": {}},
        {"properties": {"indexer": {"properties": {"tokenize": tokenize}}}, "state_dict": {}},
        {"properties": {}, "state_dict": {"encoder.mean": evil}},
        {"properties": {}, "state_dict": {evil: 1}},
    ):
        torch.save(content, file)
        for load in (load_reference, load_reference_lm):
            with pytest.raises(MilanError, match=f"refers to {name}, which no MILAN checkpoint needs"):
                load(file)
    assert not witness.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\ngetattr\n(cos\nsystem\nVtrue\ntR.",  # REDUCE of a class looked up by name
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93)R.",  # a dotted name under an allowed one
        b"\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.",
        b"ctorch.storage\n_load_from_bytes\n(C\x01.tR.",  # torch's own way back into its unpickler
        b"cfunctools\npartial\n(cos\nsystem\nVtrue\ntR.",
        b"ccollections\nOrderedDict\n(c__builtin__\neval\nV1\ntR.",
    ],
)
def test_read_pickled_any_other_name_by_any_opcode_is_refused(tmp_path: Path, content: bytes) -> None:
    write_pickle(tmp_path / "evil.pth", content)
    with pytest.raises(MilanError, match="which no MILAN checkpoint needs; nothing of it was executed"):
        read_pickled(tmp_path / "evil.pth")


@pytest.mark.parametrize(
    "content",
    [
        b"Psystem\n.",  # a persistent id that is no tensor storage
        b"\x80\x02\x82\x01.",  # the extension registry
        b"\x80\x05\x97.",  # an out-of-band buffer
        b"ccollections\nOrderedDict\n(V__class__\nV0\ntR.",
        b"ctorch\nFloatStorage\n(tR.",  # a storage type called as if it were a function
        b"(S'storage'\nctorch\nFloatStorage\nV../../evil.pth\nVcpu\nI1\ntQ.",  # a storage outside the archive's folder
        b"(S'storage'\nctorch\nFloatStorage\nV0\nVcpu\nI1\ntQ.",  # five bytes of float32
        b"\x80\x02]q\x00(h\x00h\x00e\x85",  # a list of itself, cut off
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\x00\x00x.",  # bytes as long as the address space
    ],
)
def test_read_pickled_protocol_tricks_are_refused(tmp_path: Path, content: bytes) -> None:
    write_pickle(tmp_path / "odd.pth", content, **{"0": b"12345"})
    with pytest.raises(MilanError, match="not a checkpoint of the MILAN reference"):
        read_pickled(tmp_path / "odd.pth")


def test_read_pickled_zip_tricks_are_refused_and_touch_no_other_file(tmp_path: Path) -> None:
    folder = tmp_path / "below"
    folder.mkdir()
    twice, bomb, outside = (folder / name for name in ("twice.pth", "bomb.pth", "outside.pth"))
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:  # unpacks to a thousand times its size
        archive.writestr("a/data.pkl", b"N." + bytes(10**7))
    for file, reason in ((twice, "not a file of torch.save"), (bomb, "unpacks to more than it holds")):
        with pytest.raises(MilanError, match=reason):
            read_pickled(file)
    with zipfile.ZipFile(outside, "w") as archive:  # names are looked up in the archive, never on disk
        archive.writestr("../../outside/data.pkl", b"V1\n.")
        archive.writestr("../witness", b"")
    assert read_pickled(outside) == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["below"]


def test_read_pickled_old_pickle_is_named_as_such(tmp_path: Path) -> None:
    witness, file = tmp_path / "witness", tmp_path / "old.pth"
    torch.save({"a": Evil(os.system, f"touch {witness}")}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(MilanError, match=r"old\.pth is a bare pickle, which torch wrote before version 1\.6"):
        load_reference(file)
    assert not witness.exists()


@pytest.fixture
def small() -> Captioner:
    """A captioner of the sizes that a ResNet-18's features ask for, with a backbone that has no classifier."""
    torch.manual_seed(1)
    words = ("red", "dog", ".", "-")
    decoder = Decoder(DecoderConfig(len(words), 1024, embedding_size=4, hidden_size=6, attention_hidden_size=5))
    lm = LanguageModel(LMConfig(len(words), embedding_size=4, hidden_size=5, layers=1, dropout=0.0))
    backbone = torchvision.models.resnet18(weights=None).state_dict()
    state = {name: tensor for name, tensor in backbone.items() if not name.startswith("fc.")}
    return Captioner(Indexer(Vocabulary(words)), decoder, lm, "resnet18", state, length=7, beam_size=8, lam=0.3)


def test_export_reference_round_trip_keeps_every_answer(
    small: Captioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no weights to be found but the file's
    features = torch.randn(3, 5, 1024)
    for captioner in (small, replace(small, lm=None, strategy="greedy")):
        export_reference(captioner, tmp_path / "sub/milan-small.pth")
        copy = load_reference(tmp_path / "sub/milan-small.pth")
        ours, theirs = captioner.decode(features), copy.decode(features)
        assert ours.texts == theirs.texts and torch.equal(ours.scores, theirs.scores)
        assert (copy.length, copy.beam_size, copy.lam) == (7, 8, 0.3)
        assert copy.decoder.config == captioner.decoder.config
        assert digest(replace(copy, strategy=captioner.strategy)) == digest(captioner)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(copy.encoder()(images), small.encoder()(images))


def test_export_reference_is_what_the_reference_takes(small: Captioner, tmp_path: Path) -> None:
    file = tmp_path / "milan-small.pth"
    export_reference(small, file)
    content = torch.load(file, weights_only=False)
    assert repr(torch.load(file, weights_only=True)) == repr(content)  # it holds no class that anyone must trust
    tokenize = content["properties"]["indexer"]["properties"]["tokenize"]["properties"]
    config, blob = tokenize["nlp"]
    nlp = spacy.util.get_lang_class(config["nlp"]["lang"]).from_config(config).from_bytes(blob)
    text = "a cat's low-res ears, don't!"
    assert [token.text for token in nlp(text)] == small.indexer.tokenizer(text)
    # The reference's modules: an encoder inside the decoder, whose classifier our file lacks.
    theirs = torch.nn.Module()
    theirs.encoder = torch.nn.Module()
    theirs.encoder.encoder = torch.nn.Module()
    theirs.encoder.encoder.model = torchvision.models.resnet18(weights=None)
    theirs.encoder.register_buffer("mean", torch.zeros(1, 3, 1, 1))
    theirs.encoder.register_buffer("std", torch.zeros(1, 3, 1, 1))
    theirs.add_module("lm", small.lm)
    for name, module in small.decoder.named_children():
        theirs.add_module(name, module)
    missing, unexpected = theirs.load_state_dict(content["state_dict"], strict=False)
    assert missing == [f"encoder.encoder.model.fc.{name}" for name in ("weight", "bias")] and not unexpected
    assert content["properties"]["encoder"]["properties"] == {"config": "resnet18", "pretrained": False}


def test_export_reference_lm_round_trip_keeps_every_log_probability(small: Captioner, tmp_path: Path) -> None:
    assert small.lm is not None
    export_reference_lm(small.indexer, small.lm, tmp_path / "lm.pth")
    indexer, lm = load_reference_lm(tmp_path / "lm.pth")
    inputs = torch.tensor(indexer.index(["red dog.", "dog-red"]))
    assert indexer == small.indexer
    assert torch.equal(lm.eval()(inputs), small.lm(inputs))


def test_export_reference_without_encoder_weights_takes_the_encoders_own_or_says_where_they_belong(
    small: Captioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = replace(small, encoder_state=None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    with pytest.raises(MilanError, match=r"resnet18-f37072fd\.pth is neither in .*: fetch"):
        export_reference(bare, tmp_path / "milan.pth")
    assert not list(tmp_path.iterdir())
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18-f37072fd.pth")
    export_reference(bare, tmp_path / "milan.pth")
    state, expected = load_reference(tmp_path / "milan.pth").encoder_state, bare.encoder().backbone.state_dict()
    assert state is not None and state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_export_reference_encoder_of_a_plugin_is_refused(small: Captioner, tmp_path: Path) -> None:
    with pytest.raises(MilanError, match="the reference has no encoder 'world'"):
        export_reference(replace(small, encoder_name="world"), tmp_path / "milan.pth")


def test_load_reference_tokenizer_blob_is_never_read(small: Captioner, tmp_path: Path) -> None:
    witness, file = tmp_path / "witness", tmp_path / "milan.pth"
    export_reference(small, file)
    content = torch.load(file, weights_only=True)
    blob = pickle.dumps(Evil(os.system, f"touch {witness}"))
    content["properties"]["indexer"]["properties"]["tokenize"]["properties"]["nlp"] = (Config({"nlp": {}}), blob)
    torch.save(content, file)
    assert digest(load_reference(file)) == digest(replace(small, strategy="rerank"))
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"PK not a zip"])
def test_load_reference_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "other.pth"
    file.write_bytes(content)
    with pytest.raises(MilanError, match="not a checkpoint of the MILAN reference"):
        load_reference(file)


def test_read_pickled_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.pth", tmp_path / "cut.pth"
    torch.save({"a": torch.arange(5.0), "b": (1, "s", b"\xff")}, whole)
    with zipfile.ZipFile(whole) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    for size in range(0, len(content["whole/data.pkl"]), 5):
        with zipfile.ZipFile(cut, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data[:size] if name.endswith("data.pkl") else data)
        with pytest.raises(MilanError, match="not a checkpoint of the MILAN reference"):
            read_pickled(cut)


def test_read_pickled_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(1).expand(10**9), tmp_path / "bomb.pth")  # stride 0: four bytes that want four gigabytes
    with pytest.raises(MilanError, match="not a checkpoint"):
        read_pickled(tmp_path / "bomb.pth")


def test_load_reference_foreign_state_dict_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(3)}, file)
    with pytest.raises(MilanError, match="not a checkpoint of the MILAN reference"):
        load_reference(file)


def test_load_reference_missing_file_says_where(tmp_path: Path) -> None:
    with pytest.raises(MilanError, match=r"cannot read the checkpoint .*absent\.pth"):
        load_reference(tmp_path / "absent.pth")


def test_read_pickled_tensors_and_plain_data_survive(tmp_path: Path) -> None:
    shared = torch.arange(12.0).view(3, 4)
    content: dict[str, Any] = {
        "float": shared,
        "view": shared.t()[1:],
        "half": torch.ones(2, dtype=torch.float16),
        "long": torch.tensor(7),
        "empty": torch.zeros(0),
        "plain": (1, 2.5, "ü", None, True, [b"\xff\x00"]),
    }
    torch.save(content, tmp_path / "file.pth")
    read = read_pickled(tmp_path / "file.pth")
    assert read["plain"] == content["plain"]
    for name in ("float", "view", "half", "long", "empty"):
        assert read[name].dtype == content[name].dtype and torch.equal(read[name], content[name])


def test_load_reference_unsound_property_is_refused_and_takes_no_memory(small: Captioner, tmp_path: Path) -> None:
    file = tmp_path / "milan.pth"
    export_reference(small, file)
    content = torch.load(file, weights_only=True)
    content["state_dict"] = {name: t for name, t in content["state_dict"].items() if not name.startswith("encoder.")}
    for place, value in (
        ("embedding_size", 10**15),
        ("hidden_size", -1),
        ("hidden_size", "x"),
        ("hidden_size", 10**6),  # four terabytes of weights, were they believed
        ("dropout", 2),
        ("length", 0),
        ("length", None),
        ("beam_size", "many"),
        ("temperature", float("nan")),
        ("strategy", "best"),
        ("strategy", 3),
        ("indexer", [torch.zeros(2)]),
        ("indexer/properties/vocab/properties/tokens", (1, 2, 3, 4)),
        ("lm/properties/layers", 10**12),
        ("lm/properties/hidden_size", 10**6),
    ):
        unsound = copy.deepcopy(content)
        *path, name = place.split("/")
        functools.reduce(operator.getitem, path, unsound["properties"])[name] = value
        torch.save(unsound, file)
        with pytest.raises(MilanError):
            load_reference(file)
    torch.save(content, file)
    assert load_reference(file).encoder_state is None


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("content", [torch.zeros(3), [1], {}, {"properties": None}, {"properties": torch.zeros(())}])
def test_load_reference_file_of_another_content_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pth")
    for load in (load_reference, load_reference_lm):
        with pytest.raises(MilanError, match="not a checkpoint of the MILAN reference"):
            load(tmp_path / "other.pth")


def test_load_reference_leaves_torch_s_random_state_alone(small: Captioner, tmp_path: Path) -> None:
    export_reference(small, tmp_path / "milan.pth")
    before = torch.get_rng_state()
    load_reference(tmp_path / "milan.pth")
    assert torch.equal(torch.get_rng_state(), before)


def test_read_pickled_attributes_set_on_what_it_may_call_stay_in_the_file(tmp_path: Path) -> None:
    for state in (b"(dS'evil'\nI1\ns", b"(N(dS'__defaults__'\n(S'evil'\ntst"):
        write_pickle(tmp_path / "odd.pth", b"c_codecs\nencode\n" + state + b"b.")
        mine = read_pickled(tmp_path / "odd.pth")
        write_pickle(tmp_path / "next.pth", b"c_codecs\nencode\n.")
        other = read_pickled(tmp_path / "next.pth")
        assert mine.__dict__ or mine.__defaults__
        assert not other.__dict__ and not other.__defaults__
