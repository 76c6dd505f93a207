"""Options as dataclasses: flags, TOML files and help all come from their fields."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import shlex
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lnl_ext.errors import UserError
from lnl_ext.files import write_whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["add_arguments", "build", "command_line", "option", "read_toml", "write_toml"]

_Options = TypeVar("_Options")
_NUMBERS = {int: "N", float: "X"}


def option(
    default: Any,
    description: str,
    *,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    positional: bool = False,
    saved: bool = True,
) -> Any:
    """Return a dataclass field that is an option.

    Parameters
    ----------
    default
        Its value where nothing is given.
    description
        For the help.
    choices
        The values allowed, for text.
    metavar
        What the help calls the value.
    minimum, above, maximum
        Smallest number allowed; number to exceed; largest number allowed.
    positional
        An argument instead of a flag.
    saved
        Whether it belongs in the configuration of a run.
    """
    metadata = {
        "description": description,
        "choices": choices,
        "metavar": metavar,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "positional": positional,
        "saved": saved,
    }
    return dataclasses.field(default=default, metadata=metadata)


def _kinds(options: type[Any]) -> dict[str, type[Any]]:
    """Return the type of every option; ``tuple`` for those that may come several times."""
    kinds = {}
    for name, hint in typing.get_type_hints(options).items():
        if isinstance(hint, types.UnionType):
            (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        kinds[name] = typing.get_origin(hint) or hint
    return kinds


def add_arguments(
    parser: argparse.ArgumentParser,
    options: type[Any],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Add a flag for every field of a dataclass; those not given leave no trace.

    Parameters
    ----------
    parser
        What to add them to.
    options
        The dataclass.
    groups
        Titles of the help, and the fields below each. A title without a field of the dataclass is
        left out; a field without a title stands first.
    """
    kinds = _kinds(options)
    fields = {field.name: field for field in dataclasses.fields(options)}
    places: dict[str, argparse._ActionsContainer] = dict.fromkeys(fields, parser)
    order = dict.fromkeys(fields)
    for title, names in (groups or {}).items():
        found = [name for name in names if name in fields and not _positional(fields[name])]
        if found:
            places |= dict.fromkeys(found, parser.add_argument_group(title))
            for name in found:  # in the order of the group
                order[name] = order.pop(name)
    for name in order:
        field = fields[name]
        meta, kind = field.metadata, kinds[field.name]
        text = meta["description"].replace("%", "%%")
        if field.default not in (None, (), False):
            text += f" (default: {field.default})"
        if meta["positional"]:
            if kind is tuple:
                of = _type(typing.get_args(typing.get_type_hints(options)[field.name])[0])
                parser.add_argument(
                    field.name, nargs="+", type=of, metavar=meta["metavar"], help=text
                )
            else:
                # Not SUPPRESS, which argparse would hand to the type as a text.
                parser.add_argument(field.name, nargs="?", type=_type(kind), help=text)
            continue
        extra: dict[str, Any] = {}
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            extra |= {"action": "append", "metavar": meta["metavar"]}
        else:
            extra |= {"type": _type(kind), "metavar": meta["metavar"] or _NUMBERS.get(kind)}
            if meta["choices"]:
                extra["choices"] = meta["choices"]
        flag = "--" + field.name.replace("_", "-")
        place = places[field.name]
        place.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=text, **extra)


def _positional(field: dataclasses.Field[Any]) -> bool:
    positional: bool = field.metadata["positional"]
    return positional


def _type(kind: type[Any]) -> Callable[[str], Any]:
    """Return what makes the value of a flag's text."""
    return _path if kind is Path else kind


def _path(text: str) -> Path:
    if not text:  # an unset variable of a script, which Path takes for the current folder
        raise argparse.ArgumentTypeError("is empty, expected a path")
    return Path(text)


def command_line(command: str, flags: Mapping[str, Any]) -> str:
    """Return what gives these flags, as a shell reads it."""
    words = ["lnl", command]
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{flag}={item}" for item in values]
    return shlex.join(words)


def build(options: type[_Options], *layers: Mapping[str, Any]) -> _Options:
    """Make options from layers of values, of which a later one wins, and check them.

    Raises
    ------
    UserError
        A value is not allowed.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values |= layer
    kinds = _kinds(options)
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = values.get(field.name, field.default)
        if value is None:
            continue
        if kinds[field.name] is tuple:
            values[field.name] = tuple(value)
        meta, flag = field.metadata, field.name.replace("_", "-")
        if meta["choices"] and value not in meta["choices"]:
            raise UserError(f"{flag} is {value!r}, expected one of {', '.join(meta['choices'])}")
        if meta["minimum"] is not None and not value >= meta["minimum"]:
            raise UserError(f"{flag} is {value}, expected at least {meta['minimum']}")
        if meta["above"] is not None and not value > meta["above"]:
            raise UserError(f"{flag} is {value}, expected more than {meta['above']}")
        if meta["maximum"] is not None and not value <= meta["maximum"]:
            raise UserError(f"{flag} is {value}, expected at most {meta['maximum']}")
        if kinds[field.name] is float and not math.isfinite(value):
            raise UserError(f"{flag} is {value}, expected a finite number")
    return options(**values)


def read_toml(path: Path, options: type[Any]) -> dict[str, Any]:
    """Read option values; relative paths start at the folder of the file.

    Raises
    ------
    UserError
        The file is missing or not TOML, a name is not an option, or a value is of another type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"configuration {path} is not TOML: {error}") from None
    kinds = _kinds(options)
    known = [field.name for field in dataclasses.fields(options) if field.metadata["saved"]]
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (there are {', '.join(known)})"
            raise UserError(f"configuration {path}: no option is called {name!r}{hint}")
        kind = kinds[name]
        wanted: type[Any] = str if kind is Path else list if kind is tuple else kind
        whole_for_float = kind is float and type(value) is int
        items = value if kind is tuple and isinstance(value, list) else []
        if not (type(value) is wanted or whole_for_float) or not all(
            isinstance(item, str) for item in items
        ):
            what = "a list of str" if kind is tuple else wanted.__name__
            raise UserError(f"configuration {path}: {name} is {value!r}, expected {what}")
        if kind is Path:
            value = path.parent / value
        values[name] = float(value) if kind is float else value
    return values


def write_toml(path: Path, options: Any) -> None:
    """Write the options of a run; paths absolute, what is None left out."""
    import tomli_w

    values = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.metadata["saved"] and value is not None:
            values[field.name] = saved_value(value)
    write_whole(path, tomli_w.dumps(values))


def saved_value(value: Any) -> Any:
    """Return a value as TOML has it."""
    if isinstance(value, Path):
        return str(value.absolute())
    return list(value) if isinstance(value, tuple) else value
