"""Captioner files: our format (safetensors and JSON), and the reference's ``.pth`` files.

Reading a ``.pth`` file never executes its content: the unpickler maps the few classes that the format needs to plain
data and refuses all others. The files we write contain no classes except torch's own.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.text import Indexer, Vocabulary
from milan_ray.device import without_weights
from milan_ray.errors import MilanError, explained
from milan_ray.models.checkpoints import STORAGES, index_of, numbers_of
from milan_ray.storage import Storage

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1

# The reference's encoders and settings that MILAN uses.
_REFERENCE_ENCODERS = ("alexnet", "resnet18", "resnet50", "resnet101")
_INDEX = {"start": True, "stop": True, "pad": True, "unk": True, "length": None}
_TOKENIZE = {"lemmatize": False, "lowercase": True, "ignore_stop": False, "ignore_punct": False}
_LM_SIZES = ("embedding_size", "hidden_size", "layers", "dropout")


def to_bytes(captioner: Captioner) -> dict[str, bytes]:
    """The files of a captioner: name → content. Equal captioners have equal bytes."""
    parts: dict[str, Mapping[str, Tensor]] = {
        "decoder": captioner.decoder.state_dict(),
        "lm": captioner.lm.state_dict() if captioner.lm else {},
        "encoder": captioner.encoder_state or {},
    }
    tensors = {f"{part}.{name}": t.cpu().contiguous() for part, state in parts.items() for name, t in state.items()}
    weights = safetensors.torch.save(tensors)
    config = {
        "format": FORMAT,
        "weights": hashlib.sha256(weights).hexdigest(),
        "indexer": captioner.indexer.state(),
        "decoder": asdict(captioner.decoder.config),
        "lm": asdict(captioner.lm.config) if captioner.lm else None,
        "encoder": captioner.encoder_name,
        "length": captioner.length,
        "beam_size": captioner.beam_size,
        "lam": captioner.lam,
        "strategy": captioner.strategy,
    }
    return {
        WEIGHTS: weights,
        CONFIG: json.dumps(config, ensure_ascii=False, indent=1).encode(),
    }


def from_bytes(files: Mapping[str, bytes]) -> Captioner:
    """The captioner of the files of :func:`to_bytes`.

    Raises:
        MilanError: A file is missing or has another format.
    """
    missing = {WEIGHTS, CONFIG} - set(files)
    if missing:
        raise MilanError(f"a captioner is made of {CONFIG} and {WEIGHTS}; {sorted(missing)[0]} is missing; copy both")
    remedy = "train it again or copy it again"
    with explained("not a captioner written by milan_ray", remedy, *_DAMAGED, safetensors.SafetensorError):
        config = json.loads(files[CONFIG])
        if config["format"] != FORMAT:
            raise MilanError(f"the captioner has format {config['format']}, this is for {FORMAT}; update milan_ray")
        if config.get("weights") not in (None, hashlib.sha256(files[WEIGHTS]).hexdigest()):
            raise MilanError(f"{WEIGHTS} is damaged, or not what {CONFIG} is of; train it again or copy both again")
        parts: dict[str, dict[str, Tensor]] = {"decoder": {}, "lm": {}, "encoder": {}}
        for name, tensor in safetensors.torch.load(files[WEIGHTS]).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        lm = config["lm"] and _filled(LanguageModel, LMConfig(**config["lm"]), parts["lm"], "the captioner")
        return Captioner(
            Indexer.from_state(config["indexer"]),
            _filled(Decoder, DecoderConfig(**config["decoder"]), parts["decoder"], "the captioner"),
            lm,
            config["encoder"],
            parts["encoder"] or None,
            config["length"],
            config["beam_size"],
            config["lam"],
            config.get("strategy"),  # missing in older files
        )


def digest(captioner: Captioner) -> str:
    """The identity of a captioner, weights and vocabulary included: 16 hex digits."""
    files = to_bytes(captioner)
    return hashlib.sha256(files[CONFIG] + files[WEIGHTS]).hexdigest()[:16]


def lm_digest(captioner: Captioner) -> str | None:
    """The identity of a captioner's language model and vocabulary, 16 hex digits; None without one."""
    if captioner.lm is None:
        return None
    words = json.dumps(captioner.indexer.state(), ensure_ascii=False).encode()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in captioner.lm.state_dict().items()}
    return hashlib.sha256(words + safetensors.torch.save(tensors)).hexdigest()[:16]


def load_reference(path: str | Path) -> Captioner:
    """Reads a published checkpoint (``milan-*.pth``), including the encoder's weights if it has them.

    Raises:
        MilanError: The file is missing, has another format, or refers to anything but tensors and plain data.
    """
    content = read_pickled(path)
    with _reading(path):
        properties, state = content["properties"], content["state_dict"]
        config, kind = properties["encoder"]["properties"]["config"], content["children"]["encoder"]
        if not isinstance(config, str):
            raise TypeError("an encoder without a name")
        if kind != "PyramidConvEncoder":
            raise MilanError(f"{path} was trained on a {kind}; only PyramidConvEncoder checkpoints can be read")
        indexer = _indexer(properties["indexer"], path)
        sizes = DecoderConfig(
            len(indexer.vocabulary),
            state["init_h.0.weight"].shape[1],
            properties["embedding_size"],
            properties["hidden_size"],
            properties["attention_hidden_size"],
            properties["dropout"],
        )
        lm = None
        if properties["lm"] is not None:
            lm = _language_model(properties["lm"]["properties"], indexer, _below("lm.", state), path)
        decoder_state = {name: t for name, t in state.items() if not name.startswith(("encoder.", "lm."))}
        return Captioner(
            indexer,
            _filled(Decoder, sizes, decoder_state, str(path)),
            lm,
            config,
            _below("encoder.encoder.model.", state) or None,
            properties["length"],
            properties["beam_size"],
            properties["temperature"],
            properties["strategy"],
        )


def load_reference_lm(path: str | Path) -> tuple[Indexer, LanguageModel]:
    """Reads a language model saved by the reference (``lm.pth``).

    Raises:
        MilanError: As :func:`load_reference`.
    """
    content = read_pickled(path)
    with _reading(path):
        properties = content["properties"]
        indexer = _indexer(properties["indexer"], path)
        return indexer, _language_model(properties, indexer, content["state_dict"], path)


def export_reference(captioner: Captioner, path: str | Path) -> None:
    """Writes a checkpoint (``milan-*.pth``) that the reference can load; :func:`load_reference` reads it back.

    The file contains the encoder's weights and turns ``pretrained`` off, so that the reference downloads nothing. If
    they are not stored with the captioner, the encoder's own weights are located as for ``describe``. A backbone
    without its classifier is written as it is: the reference loads with ``strict=False`` and leaves its classifier at
    its initial values, on which no feature depends.

    The tokenizer's spaCy configuration is written as a plain dict, which the reference accepts. A file with spaCy's own
    class loads only with some versions of spaCy, because the class's module differs between versions.

    Raises:
        MilanError: The reference has no such encoder, its weights are not found, or the path cannot be written.
    """
    if captioner.encoder_name not in _REFERENCE_ENCODERS:
        raise MilanError(
            f"the reference has no encoder {captioner.encoder_name!r} (only {', '.join(_REFERENCE_ENCODERS)}); "
            "train a captioner on one of these to export it"
        )
    encoder, lm, config = captioner.encoder(), captioner.lm, captioner.decoder.config
    backbone = captioner.encoder_state or encoder.backbone.state_dict()
    indexer = _indexer_record(captioner.indexer)
    properties = {
        "indexer": indexer,
        "encoder": _record(config=captioner.encoder_name, pretrained=False),
        "lm": None if lm is None else _lm_record(lm, indexer),
        "embedding_size": config.embedding_size,
        "hidden_size": config.hidden_size,
        "attention_hidden_size": config.attention_hidden_size,
        "dropout": config.dropout,
        "length": captioner.length,
        "strategy": captioner.strategy or ("beam" if lm is None else "rerank"),
        "temperature": captioner.lam,
        "beam_size": captioner.beam_size,
    }
    state = {
        "encoder.mean": encoder.mean,
        "encoder.std": encoder.std,
        **{f"encoder.encoder.model.{name}": tensor for name, tensor in backbone.items()},
        **({} if lm is None else {f"lm.{name}": tensor for name, tensor in lm.state_dict().items()}),
        **captioner.decoder.state_dict(),
    }
    _save(properties, {"encoder": "PyramidConvEncoder"}, state, path)


def export_reference_lm(indexer: Indexer, lm: LanguageModel, path: str | Path) -> None:
    """Writes a language model (``lm.pth``) that the reference can load; :func:`load_reference_lm` reads it back.

    Raises:
        MilanError: The path cannot be written.
    """
    _save(_lm_record(lm, _indexer_record(indexer))["properties"], {}, lm.state_dict(), path)


def _record(**properties: Any) -> dict[str, Any]:
    """The reference's record of a serialised object."""
    return {"properties": properties, "children": {}}


def _indexer_record(indexer: Indexer) -> dict[str, Any]:
    import spacy  # only here, as in captioner/text.py

    english = spacy.blank("en")
    tokenize = _record(nlp=(dict(english.config), english.to_bytes()), **_TOKENIZE)
    return _record(vocab=_record(tokens=tuple(indexer.vocabulary.words)), tokenize=tokenize, **_INDEX)


def _lm_record(lm: LanguageModel, indexer: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {name: getattr(lm.config, name) for name in _LM_SIZES}
    return _record(indexer=indexer, **sizes)


def _save(
    properties: Mapping[str, Any], children: Mapping[str, str], state: Mapping[str, Tensor], path: str | Path
) -> None:
    # Cloned: torch.save writes the whole storage of a view.
    tensors = collections.OrderedDict((name, tensor.detach().cpu().clone()) for name, tensor in state.items())
    buffer = io.BytesIO()
    torch.save({"properties": properties, "children": children, "state_dict": tensors}, buffer)
    path = Path(path).expanduser()
    Storage(path.parent).put(path.name, buffer.getbuffer())


def _reading(path: str | Path) -> AbstractContextManager[None]:
    """Converts the errors that readers raise for invalid content."""
    return explained(f"{path} is not a checkpoint of the MILAN reference", "download it again", *_DAMAGED)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _filled(model: Callable[[Any], Any], config: object, state: Mapping[str, Tensor], source: str) -> Any:
    """A model with these weights."""
    if getattr(config, "layers", 0) > len(state):
        raise ValueError(f"{config} has more layers than weights")
    with without_weights():  # a small file may claim a huge model
        filled = model(config)
    own = filled.state_dict()
    mine = {name: tensor.to(own[name].dtype, copy=True) if name in own else tensor for name, tensor in state.items()}
    try:
        filled.load_state_dict(mine, assign=True)
    except RuntimeError as error:
        raise MilanError(
            f"the weights in {source} do not fit its configuration: {error}; get the file again"
        ) from error
    return filled


def _indexer(record: Mapping[str, Any], path: str | Path) -> Indexer:
    properties = record["properties"]
    tokenize = properties["tokenize"]["properties"]
    settings = {name: properties[name] for name in _INDEX} | {name: tokenize[name] for name in _TOKENIZE}
    if settings != _INDEX | _TOKENIZE:
        raise MilanError(
            f"{path} was trained with other text settings than MILAN's ({settings}); it cannot be used here"
        )
    tokens = tuple(properties["vocab"]["properties"]["tokens"])
    if not all(isinstance(token, str) for token in tokens):
        raise TypeError("a vocabulary of something else than words")
    return Indexer(Vocabulary(tokens))


def _language_model(
    properties: Mapping[str, Any], indexer: Indexer, state: Mapping[str, Tensor], path: str | Path
) -> LanguageModel:
    sizes = [properties[name] for name in _LM_SIZES]
    return _filled(LanguageModel, LMConfig(len(indexer.vocabulary), *sizes), state, str(path))


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    # Strides of 0, or many copies of one storage, would let a small file fill the memory.
    if math.prod(size) > storage.numel():
        raise ValueError(f"a tensor of shape {size} in {storage.numel()} numbers")
    return torch.as_strided(storage, size, stride, offset)  # raises if it exceeds the storage


def _encode(text: str, encoding: str) -> bytes:
    return str.encode(text, {"latin1": "latin1"}[encoding])  # how pickle protocol 2 writes bytes


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("_codecs", "encode"): _encode,
}
# The class of spaCy's configuration in several versions of spaCy; read as a dict.
_CONFIG_CLASSES = {("confection", "Config"), ("confection._config", "Config"), ("thinc.config", "Config")}


class _Unpickler(pickle.Unpickler):
    """Reads the pickle inside a torch zip file; allows only the names in ``_ALLOWED`` and tensor storages."""

    def __init__(self, file: BinaryIO, read_storage: Callable[[str], bytes], source: str) -> None:
        super().__init__(file)
        self._read_storage = read_storage
        self._source = source
        self._storages: dict[str, Tensor] = {}
        # A class of its own, and below a function of its own, because a pickle may set attributes on them.
        self._config_class = type("Config", (dict,), {})

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) in _CONFIG_CLASSES:
            return self._config_class
        if (module, name) not in _ALLOWED:
            raise MilanError(
                f"{self._source} refers to {module}.{name}, which no MILAN checkpoint needs; "
                "nothing of it was executed; do not trust this file"
            )
        allowed = _ALLOWED[module, name]
        return allowed if isinstance(allowed, type) else lambda *arguments: allowed(*arguments)

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if dtype not in STORAGES.values():
            raise ValueError(f"a tensor of type {dtype}")
        if key not in self._storages:
            self._storages[key] = numbers_of(self._read_storage(key), dtype)
        return self._storages[key]


# Exceptions that zipfile, pickle and torch raise for invalid content.
_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    OverflowError,
    MemoryError,
)


def read_pickled(path: str | Path) -> Any:
    """Reads a ``torch.save`` zip file as plain data: dicts, lists, strings, numbers, tensors.

    Raises:
        MilanError: The file is missing or damaged, or refers to anything but tensors and plain data.
    """
    try:
        with _reading(path), zipfile.ZipFile(path) as archive:
            index = index_of(archive, path)
            folder = f"{index.removesuffix('data.pkl')}data"
            content = io.BytesIO(archive.read(index))
            return _Unpickler(content, lambda key: archive.read(f"{folder}/{key}"), str(path)).load()
    except OSError as error:
        raise MilanError(f"cannot read the checkpoint {path} ({error.strerror}); check the path") from error
    except zipfile.BadZipFile as error:
        with _reading(path), open(path, "rb") as file:
            if file.read(1) != b"\x80":
                raise ValueError(str(error)) from error
        raise MilanError(
            f"{path} is a bare pickle, which torch wrote before version 1.6 and which cannot be read without executing "
            "it; where you trust it, load it with torch and save it again"
        ) from error
