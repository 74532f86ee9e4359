"""How text from a command line becomes typed values, and what is said where it cannot.

Imports no jax, so that a mistyped name is answered at once. A method's own knobs are the keyword-only
arguments of its factory.
"""

import difflib
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

LARGEST_INT = 2**31 - 1  # JAX counts in int32
LARGEST_FLOAT = 3.4e38  # and computes in float32, where more is infinity


class UsageError(ValueError):
    """The user asked for something that does not exist or cannot be; the message is one line for them."""


def nearest(kind: str, name: Any, names: Iterable[Any]) -> str:
    """One line for a name that does not exist: "no task 'cifar1O'; did you mean 'mnist'? there are: ..."."""
    known = [str(n) for n in names]
    lower = list(dict.fromkeys(n.lower() for n in known))
    close = difflib.get_close_matches(str(name).lower(), lower, n=3, cutoff=0.5)
    likely = [repr(n) for c in close for n in known if n.lower() == c]
    hint = f"; did you mean {' or '.join(likely)}?" if likely else ";"
    return f"no {kind} '{brief(name)}'{hint} there are: {', '.join(known) or 'none'}"


def brief(value: Any, most: int = 80) -> str:
    """The value as text that fits into a line."""
    if isinstance(value, int) and abs(value) >= 10**most:  # str() itself refuses numbers of thousands of digits
        return f"a number of more than {most} digits"
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."


def fits(value: Any, kind: Any) -> bool:
    """Whether the value is of a type that `parse_value` reads; numbers have to be finite in float32.

    A whole number is a number as well, but true is neither.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is tuple:
        kinds = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is Ellipsis else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT
    return kind in (int, str, bool, type(None)) and type(value) is kind


def parse_value(text: str, kind: Any) -> Any:
    """`text` as a value of the type `kind`: int, float, bool, str, Literal, X | None, or a tuple of those.

    A tuple's items are separated by commas and the empty text is the empty tuple; None is written "none".
    UsageError says which type was wanted; a float must be finite.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        for choice in inner:
            if text == str(choice):
                return choice
        raise UsageError(nearest("choice", text, inner))
    if origin in (typing.Union, types.UnionType):
        for one in sorted(inner, key=lambda one: one is not type(None)):  # "none" is text as well
            try:
                return parse_value(text, one)
            except UsageError:
                continue
        raise UsageError(f"'{brief(text)}' is not {wanted(kind)}")
    if origin is tuple:
        items = [item.strip() for item in text.split(",")] if text.strip() else []
        kinds = inner[:1] * len(items) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(items):
            raise UsageError(f"'{brief(text)}' is not {wanted(kind)}")
        return tuple(parse_value(item, one) for item, one in zip(items, kinds, strict=True))
    truth = {"true": True, "1": True, "false": False, "0": False}
    readers = {int: int, float: float, str: str, bool: lambda t: truth[t.lower()], type(None): _none}
    try:
        value = readers[kind](text)
    except (ValueError, KeyError):
        raise UsageError(f"'{brief(text)}' is not {wanted(kind)}") from None
    if kind is float and not math.isfinite(value):
        raise UsageError(f"'{brief(text)}' is not a finite number")
    return value


def parse_path(name: str, text: str) -> Path:
    """The path of a flag or field, ~ replaced. UsageError for no such user and names that no file can have."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"{name} is '{brief(text)}', but {Path(text).parts[0]} is no user's folder") from None
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise UsageError(f"{name} is '{brief(text)}'; the names in a path can have at most 255 bytes")
    return path


def _none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(text)


def wanted(kind: Any) -> str:
    """The type `kind` in a user's words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(wanted(one) for one in inner)
    if origin is tuple:
        items = f"{wanted(inner[0])}, ..." if inner[-1] is Ellipsis else ", ".join(map(wanted, inner))
        return f"({items}) with commas between"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, "none")


def _readable(kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType, tuple):
        return all(one is Ellipsis or one is type(None) or _readable(one) for one in inner)
    return origin is Literal or kind in (int, float, bool, str)


def option_types(factory: Callable) -> dict[str, tuple[Any, Any]]:
    """The knobs of a method: keyword-only arguments of its factory -> {name: (type, default)}.

    The type is the annotation, or else the default's. Only what has a default and can be written as text is
    a knob; any other argument is for the code that puts the run together to supply.
    """
    hints = typing.get_type_hints(factory)
    knobs = {
        name: (hints.get(name, type(argument.default)), argument.default)
        for name, argument in inspect.signature(factory).parameters.items()
        if argument.kind is argument.KEYWORD_ONLY and argument.default is not argument.empty
    }
    return {name: knob for name, knob in knobs.items() if _readable(knob[0])}


def default_options(factory: Callable) -> dict[str, Any]:
    """Every knob of a method with its default, so that the record of a run leaves none unsaid."""
    return {name: default for name, (_, default) in option_types(factory).items()}


def parse_options(factory: Callable, texts: dict[str, str]) -> dict[str, Any]:
    """Typed values of the knobs named in `texts`. UsageError for an unknown knob or a wrong value."""
    known, values = option_types(factory), {}
    for name, text in texts.items():
        if name not in known:
            raise UsageError(nearest(f"{factory.__name__} option", name, known))
        try:
            values[name] = parse_value(text, known[name][0])
        except UsageError as error:
            raise UsageError(f"config.options.{name}: {error}") from None
        for value in values[name] if isinstance(values[name], tuple) else (values[name],):
            most = {int: LARGEST_INT, float: LARGEST_FLOAT}.get(type(value), math.inf)
            if most < math.inf and abs(value) > most:
                raise UsageError(f"config.options.{name} is {brief(value)}; it must be from -{most} to {most}")
    return values
