"""Parses the command line: errors are one sentence, and options can come from a file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml

from milan_ray.cli.build_configs import read_text
from milan_ray.errors import MilanError, unknown_name
from milan_ray.progress import say

CONFIG = "--config"

ONLY = r"\bonly\b"
"""Pattern that identifies the help text of filtering options."""


class _Loader(yaml.SafeLoader):
    """YAML loader without surprises: duplicate keys are an error, and ``012``, ``1:30``, dates and hex are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        letter: [
            (tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")
        ]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Constructs a mapping.

        Raises:
            yaml.constructor.ConstructorError: A key is duplicated.
        """
        keys: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in keys and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands there twice, leave one", key.start_mark
                )
            keys |= {} if name is None else {name: key}
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence. Abbreviated options are rejected, so that new ones cause no ambiguity."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **keywords})

    def error(self, message: str) -> NoReturn:
        """Prints the error and a pointer to the help, and exits with status 2."""
        say(f"error: {message}; {self.prog} --help lists what there is.", level="error")
        raise SystemExit(2)

    def tell_defaults(self) -> None:
        """Appends the default (none or all) to the help of every optional option whose help does not mention one."""
        needed = [
            action for group in self._mutually_exclusive_groups if group.required for action in group._group_actions
        ]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    parser.tell_defaults()
                continue
            text = action.help or "default"
            silent = action.option_strings and "default" not in text and action.nargs != 0
            if silent and action.default in (None, "", [], ()) and not action.required and action not in needed:
                action.help = f"{text} (default: {'all' if re.search(ONLY, text) else 'none'})"

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses a command line, including options from the file of ``--config``.

        Args:
            arguments: The command line without the program's name.

        Returns:
            The options; ``rest`` holds other entries of the file, for subcommands that allow them; ``given`` maps the
            destinations of given options to the options as they were written.

        Raises:
            MilanError: The file cannot be read, or has an entry that is no option of the subcommand.
        """
        verb = _verb_of(self, arguments)
        more, rest = from_file(verb, arguments)
        args, unknown = self.parse_known_args([*arguments, *more])
        if unknown:
            name, words = unknown[0].partition("=")[0], " ".join(unknown)
            if not name.startswith("-"):
                verb.error(f"what is {words!r}?")
            nearest = str(unknown_name("option", name, _options(verb))).removesuffix(".")
            verb.error(nearest)
        args.rest = rest
        written = (token.partition("=")[0] for token in (*arguments, *more))
        known = _options(verb)
        args.given = {known[name].dest: name for name in written if name in known}
        return args


def from_file(verb: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Reads the file of ``--config`` and converts it to command-line arguments.

    Args:
        verb: The subcommand's parser. Its default ``rest`` is not None if the file may hold more than options.
        arguments: The command line, which takes precedence.

    Returns:
        Arguments to append; entries that are no options.

    Raises:
        MilanError: The file is no YAML mapping, or has a key that is no option or a value that no option can have.
    """
    options = _options(verb)
    if CONFIG not in options:
        return [], {}
    first = Parser(add_help=False, prog=verb.prog)
    first.add_argument(CONFIG)
    path = first.parse_known_args(list(arguments))[0].config
    if path is None:
        return [], {}
    try:
        entries = _Loader(read_text(CONFIG, path)).get_single_data()  # as yaml.safe_load does
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise MilanError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(entries, dict):
        raise MilanError(f"{path} must hold lines of the form 'option: value'.")
    given = {token.partition("=")[0] for token in arguments if token.startswith("--")}
    tokens: list[str] = []
    rest: dict[str, Any] = {}
    for key, value in entries.items():
        name = "--" + str(key).replace("_", "-")
        if name in options and name != CONFIG:
            if not given & _rivals(verb, options[name]):
                tokens += _tokens(options[name], name, value, path)
        elif verb.get_default("rest") is not None:
            rest[key] = value
        else:
            names = [known.removeprefix("--") for known in options if known != CONFIG]
            raise unknown_name(f"option in {path}:", str(key), names, f"{verb.prog} --help lists them.")
    return tokens, rest


def _verb_of(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Finds the parser of the command line's subcommand and action; exits the program if one is unknown."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and arguments and not arguments[0].startswith("-"):
            if arguments[0] not in action.choices:
                kind = str(action.metavar).lower()
                parser.error(str(unknown_name(kind, arguments[0], action.choices)).removesuffix("."))
            return _verb_of(action.choices[arguments[0]], arguments[1:])
    return parser


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Returns all options except ``--help``: ``--name`` → action."""
    return {
        name: action
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--") and name != "--help"
    }


def _rivals(parser: argparse.ArgumentParser, action: argparse.Action) -> set[str]:
    """Returns the names of an option, including those of mutually exclusive options."""
    rivals = set(action.option_strings)
    for group in parser._mutually_exclusive_groups:
        if action in group._group_actions:
            rivals |= {name for other in group._group_actions for name in other.option_strings}
    return rivals


def _tokens(action: argparse.Action, name: str, value: object, where: str) -> list[str]:
    """Converts an option and its value to command-line arguments."""
    if value is None:
        return []
    if action.nargs == 0 or (action.nargs == "?" and isinstance(value, bool)):
        if not isinstance(value, bool):
            raise MilanError(f"{name.removeprefix('--')} in {where} is true or false, not {value!r}.")
        return [name] if value else []
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool | list | dict) for item in values):
        raise MilanError(f"{name.removeprefix('--')} in {where} is {value!r}; give what {name} takes.")
    texts = [str(item) for item in values]
    if isinstance(action, argparse._AppendAction):
        return [f"{name}={text}" for text in texts]
    if action.nargs in (None, "?"):
        return [f"{name}={','.join(texts)}"]  # on the command line, lists are comma-separated
    return [name, *texts]
