"""Read a command line into a dataclass with argparse. A field is a setting; its docstring is the help text.

`Usage` says what a command does and which settings its `--help` shows; `--help-all` shows all of them.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from bardlet.config.docs import docs, first_sentence
from bardlet.config.paths import given
from bardlet.config.settings import flag
from bardlet.errors import BardletError

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """A heading of the help, with the settings below it.

    names: settings that `--help` shows; more: settings that only `--help-all` shows.
    """

    title: str
    names: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Help text of a command.

    synopsis: the command line in short, without `bardlet COMMAND`; about: what the command does, in a sentence or two;
    examples: (command line, what it does); positionals: placeholders of the fields that are typed without a flag;
    metavars: placeholders of values, where N, X and NAME would say too little.
    """

    command: str
    synopsis: str
    about: str
    examples: tuple[tuple[str, str], ...]
    groups: tuple[Group, ...]
    positionals: dict[str, str] = field(default_factory=dict)
    metavars: dict[str, str] = field(default_factory=dict)

    @property
    def help_flag(self) -> str:
        """The flag that lists every setting."""
        return "--help-all" if any(group.more for group in self.groups) else "--help"


METAVARS = {"minutes": "M", "out": "DIR", "config": "FILE", "init": "DIR", "lora": "RANK", "device": "DEVICE",
            "reward": "REWARD", "source": "FILE", "target": "FILE", "pair": "FROM-TO", "compile": "WHEN",
            "dtype": "TYPE", "keep": "WHICH", "tokenizer": "KIND"}
"""Placeholders that all commands share."""


SYNONYMS = {"temp": "temperature", "gpu": "device cuda", "cuda": "device cuda", "cpu": "device cpu",
            "learning-rate": "lr", "length": "tokens", "max-tokens": "tokens", "max-new-tokens": "tokens",
            "num-samples": "num", "batch": "batch-size", "bs": "batch-size", "output": "out", "output-dir": "out",
            "layers": "n-layer", "num-layers": "n-layer", "heads": "n-head", "num-heads": "n-head",
            "embd": "n-embd", "d-model": "n-embd", "hidden-size": "n-embd", "context": "block-size",
            "context-length": "block-size", "seq-len": "block-size", "max-iters": "steps", "iters": "steps",
            "epochs": "steps", "wd": "weight-decay", "warmup": "warmup-steps", "precision": "dtype",
            "lora-rank": "lora", "time": "minutes", "force": "yes"}
"""Names that other tools use for a setting."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise BardletError(message)


def parse(kind: type[T], argv: Sequence[str], usage: Usage, explain: Callable[[str], str] | None = None) -> T:
    """Return a `kind`, a dataclass, from `argv`. `--help` and `--help-all` print and exit with 0.

    explain: see `typed`.

    Raises:
        BardletError: the first word that does not fit, what is wrong with it, and what to do.
    """
    values = typed((kind,), argv, usage, explain=explain)
    for each in fields(cast(Any, kind)):
        if each.default is MISSING and each.default_factory is MISSING and each.name not in values:
            missing = usage.positionals.get(each.name, flag(each.name))
            raise BardletError(f"{missing} is missing; for example: {usage.examples[0][0]}")
    paths = [name for name, metavar in (METAVARS | usage.metavars).items() if metavar in ("FILE", "DIR")]
    for name in (*usage.positionals, *paths):  # a shell leaves ~ behind = and in quotes alone
        if isinstance(value := values.get(name), str | tuple):
            values[name] = given(value) if isinstance(value, str) else tuple(map(given, value))
    return kind(**values)


def typed(kinds: Sequence[type], argv: Sequence[str], usage: Usage, hidden: Sequence[str] = (),
          explain: Callable[[str], str] | None = None) -> dict[str, Any]:
    """Return the settings that a command line names, with their values.

    Args:
        kinds: dataclasses; their fields together are the settings.
        hidden: fields that cannot be typed.
        explain: returns the message for an unknown setting, by its field name; empty: suggest a similar one.

    Raises:
        BardletError: as `parse`.
    """
    arguments = [_with_dashes(word) for word in argv]
    parser = build(kinds, usage, hidden, everything="--help-all" in arguments or usage.help_flag == "--help")
    if {"-h", "--help", "--help-all"} & set(arguments):
        print(parser.format_help(), end="")
        sys.exit(0)
    try:
        namespace, extra = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        reason = _reason(error, arguments, parser)
        raise BardletError(f"{reason}; see `bardlet {usage.command} {usage.help_flag}`") from None
    if extra:
        raise BardletError(_unknown(extra, arguments, parser, usage, hidden, explain))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items()
            if value not in (None, []) or name in _flags_in(arguments)}


def build(kinds: Sequence[type], usage: Usage, hidden: Sequence[str] = (),
          everything: bool = False) -> argparse.ArgumentParser:
    """Return the parser of a command. everything: show all settings, with their whole help text."""
    parser = _Parser(prog=f"bardlet {usage.command}", add_help=False, allow_abbrev=False, exit_on_error=False,
                     argument_default=argparse.SUPPRESS, formatter_class=_formatter, usage=f"%(prog)s {usage.synopsis}",
                     description=_description(usage))
    parser._positionals.title = "input"
    settings = {each.name: (kind, each) for kind in reversed(kinds) for each in fields(kind) if each.name not in hidden}
    for name, metavar in usage.positionals.items():
        kind, _ = settings[name]
        several = get_origin(_hints(kind)[name]) is tuple
        parser.add_argument(name, nargs="*" if several else "?", metavar=metavar, type=str,
                            help=(docs(kind)[name] if everything else first_sentence(docs(kind)[name])).rstrip("."))
    for group in (*usage.groups, _rest(settings, usage)):
        section = parser.add_argument_group(group.title)
        for name in (*group.names, *group.more):
            if name in settings:
                _add(section, name, *settings[name], usage, everything, shown=everything or name in group.names)
    last = parser.add_argument_group("help")
    last.add_argument("-h", "--help", action="store_true", help="Show this text")
    if usage.help_flag == "--help-all":
        last.add_argument("--help-all", action="store_true", help="Show every setting, with its default")
    last.add_argument("--debug", action="store_true", help="Show the traceback of an error")
    return parser


def _rest(settings: Iterable[str], usage: Usage) -> Group:
    """Return the settings that no group of `usage` names."""
    named = {name for group in usage.groups for name in (*group.names, *group.more)} | set(usage.positionals)
    return Group("more", more=tuple(name for name in settings if name not in named))


def _add(section: Any, name: str, kind: type, each: Any, usage: Usage, everything: bool, shown: bool) -> None:
    """Add the flag of one setting to a parser or argument group."""
    hint, flag = _hints(kind)[name], "--" + name.replace("_", "-")
    text = docs(kind)[name] if everything else first_sentence(docs(kind)[name])
    choices, notes = _choices(hint), []
    if choices and len(choices) < 6 and not text.startswith(choices[0]):
        notes.append(", ".join(choices))
    silent: tuple[Any, ...] = (None, (), "", MISSING) if everything else (None, (), "", MISSING, "auto")
    if each.default not in silent and each.default is not False and (everything or "default:" not in text):
        notes.append(f"default: {'on' if each.default is True else each.default}")
    if notes:
        text = f"{text.rstrip('.')} ({'; '.join(notes)})"
    text = text.rstrip(".") + "." * (". " in text)
    options: dict[str, Any] = {"help": text.replace("%", "%%") if shown else argparse.SUPPRESS, "dest": name}
    if hint is bool and each.default:
        section.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    if hint is bool:  # --no-X overrides a settings file; the help shows the short form
        section.add_argument(flag, action="store_true", **options)
        section.add_argument(f"--no-{flag[2:]}", action="store_false", **{**options, "help": argparse.SUPPRESS})
        return
    metavar = usage.metavars.get(name) or METAVARS.get(name) or _placeholder(hint)
    if get_origin(hint) is tuple:
        options |= {"nargs": "+", "action": "extend"}
    wanted = _wanted(hint, each.default)
    action = section.add_argument(flag, type=_converter(flag, hint, wanted), metavar=metavar, **options)
    action.wanted = wanted  # read by `_reason`
    if choices:
        action.completer = lambda **_: choices  # read by argcomplete


# ---------------------------------------------------------------------------------- help


def _width() -> int:
    return min(100, max(60, shutil.get_terminal_size().columns - 1))


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=25, width=_width())


def _description(usage: Usage) -> str:
    width = max(len(line) for line, _ in usage.examples)
    examples = "\n".join(f"  {line:{width}}  {purpose}".rstrip() for line, purpose in usage.examples)
    return f"{textwrap.fill(usage.about, _width())}\n\nexamples:\n{examples}"


# ---------------------------------------------------------------------------------- types


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _parts(hint: Any) -> list[Any]:
    """Return the types of a union or a tuple, without None and `...`."""
    if get_origin(hint) is Literal or not get_args(hint):
        return [hint]
    return [part for part in get_args(hint) if part not in (type(None), ...)]


def _choices(hint: Any) -> list[str]:
    return [str(choice) for part in _parts(hint) if get_origin(part) is Literal for choice in get_args(part)]


def _placeholder(hint: Any) -> str:
    return {int: "N", float: "X", bool: "BOOL"}.get(_parts(hint)[0], "NAME")


def _wanted(hint: Any, default: Any) -> str:
    """Return the values that fit a type, as in "a number, or none"; empty if any text fits.

    "or none" is for settings that are on by default.
    """
    if choices := _choices(hint):
        return f"one of {', '.join(choices)}"
    kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(_parts(hint)[0], "")
    return f"{kind}, or none" if kind and default is not None and type(None) in get_args(hint) else kind


def _converter(flag: str, hint: Any, wanted: str) -> Callable[[str], Any]:
    """Return a function that turns a typed word into a value of a type."""
    kind, optional, choices = _parts(hint)[0], type(None) in get_args(hint), _choices(hint)

    def convert(word: str) -> Any:
        if optional and word.lower() == "none":
            return None
        if choices and word not in choices:
            near = get_close_matches(word, choices, 1)
            suggestion = f"; did you mean {near[0]}?" if near else ""
            raise BardletError(f"{flag} {word}: must be {wanted}{suggestion}")
        if choices:
            return word
        try:
            return {"true": True, "false": False}[word.lower()] if kind is bool else kind(word)
        except (ValueError, KeyError):
            raise BardletError(f"{flag} {word}: must be {wanted}") from None

    return convert


# ---------------------------------------------------------------------------------- errors


def _with_dashes(word: str) -> str:
    """Return a flag with - for _: `--batch_size=4` is `--batch-size=4`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") and " " not in name else word


def _flags_in(arguments: Sequence[str]) -> set[str]:
    return {word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
            for word in arguments if word.startswith("--")}


def _reason(error: argparse.ArgumentError, arguments: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Return the message for an error of argparse."""
    flag, flags = (error.argument_name or "").split("/")[0], parser._option_string_actions
    if "expected" in str(error):
        wanted = getattr(flags.get(flag), "wanted", "")
        index = arguments.index(flag) + 1 if flag in arguments else len(arguments)
        value = arguments[index] if index < len(arguments) else ""
        if value.startswith("-") and value.partition("=")[0] not in flags:
            return f"{flag} needs a value; write one that begins with - as {flag}={value}"
        return f"{flag} needs a value" + (f": {wanted}" if wanted else "")
    if "ignored explicit argument" in str(error):
        off = f"--no-{flag.removeprefix('--')}"
        return f"{flag} takes no value; write {flag}" + (f", or {off}" if off in flags else "")
    return f"{flag}: {error.message}"


def _unknown(extra: Sequence[str], arguments: Sequence[str], parser: argparse.ArgumentParser, usage: Usage,
             hidden: Sequence[str], explain: Callable[[str], str] | None) -> str:
    """Return the message for the first unknown setting, or else for the first surplus word."""
    flags = parser._option_string_actions
    word = next((word for word in extra if word.startswith("-")), extra[0])
    name = word.partition("=")[0]
    if not name.startswith("-"):
        if "--prompt" in flags and "prompt" not in _flags_in(arguments):
            return f"{word}: unexpected; name the text to continue with --prompt {shlex.quote(' '.join(extra))}"
        return f"{word}: unexpected; quote a text that has spaces, and see `bardlet {usage.command} --help`"
    field_name = name.strip("-").replace("-", "_")
    if field_name in usage.positionals:
        return f"{name}: type {usage.positionals[field_name]} without a flag; for example: {usage.examples[0][0]}"
    if explain and (reason := explain(field_name) or explain(field_name.removeprefix("no_"))):
        return f"{name}: {reason}"
    if field_name in hidden:
        return f"{name}: only a settings file can set it; use --config FILE"
    if hint := _similar(name.strip("-"), [flag[2:] for flag in flags if flag.startswith("--")]):
        return f"unknown setting {name}; did you mean --{hint}?{' A step is not an epoch' * (name == '--epochs')}"
    return f"unknown setting {name}; `bardlet {usage.command} {usage.help_flag}` lists the settings"


def _similar(name: str, known: Sequence[str]) -> str:
    """Return the setting that `name` probably means, from other tools' names or by its letters; empty if unclear."""
    other = SYNONYMS.get(name, "")
    if other.split(" ")[0] in known:
        return other
    known = [each for each in known if each not in ("help", "help-all")]
    if near := get_close_matches(name, known, 1, cutoff=0.75):
        return near[0]
    longer = [each for each in known if len(name) > 2 and (each.startswith(name) or name.startswith(f"{each[:4]}"))]
    return longer[0] if len(longer) == 1 else ""
