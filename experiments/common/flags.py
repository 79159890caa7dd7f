"""Kinds of flags that absl lacks: finite numbers, and lists of values with commas between them.

A flag of these kinds belongs to the module that defines it, as one of absl's does.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from absl import flags

T = TypeVar("T")

flags.disclaim_key_flags()


class _FiniteParser(flags.FloatParser):
    def parse(self, argument: str | float) -> float:
        value = super().parse(argument)
        if not math.isfinite(value):
            raise ValueError("give a finite number")
        return value


class _ListParser(flags.ArgumentParser[list[T]], Generic[T]):
    """Values with commas between them; `parse_one` turns the text of one into its values."""

    def __init__(self, parse_one: Callable[[str], Iterable[T]], kind: str, *, may_be_empty: bool = False) -> None:
        super().__init__()
        self.syntactic_help = f"{kind} with commas between them"
        self._parse_one, self._may_be_empty = parse_one, may_be_empty

    def parse(self, argument: str | Sequence[Any]) -> list[T]:
        texts = argument.split(",") if isinstance(argument, str) else map(str, argument)
        try:
            values = [value for text in texts if text.strip() for value in self._parse_one(text.strip())]
        except ValueError as error:
            raise ValueError(f"give {self.syntactic_help}; {error}") from None
        if not values and not self._may_be_empty:
            raise ValueError(f"give {self.syntactic_help}, one at least")
        return values


class _ListSerializer(flags.ArgumentSerializer[list[T]], Generic[T]):
    def __init__(self, to_text: Callable[[T], str]) -> None:
        self._to_text = to_text

    def serialize(self, value: list[T]) -> str:
        return ",".join(map(self._to_text, value))


def define_float(
    name: str,
    default: float | None,
    text: str,
    *,
    lower_bound: float | None = None,
    upper_bound: float | None = None,
) -> flags.FlagHolder[float]:
    """A flag that takes a number, but neither `nan` nor `inf`."""
    return flags.DEFINE(_FiniteParser(lower_bound, upper_bound), name, default, text, serializer=_ONE)


def define_integers(
    name: str, default: Sequence[int] | None, text: str, *, lower_bound: int = 1
) -> flags.FlagHolder[list[int]]:
    """A flag that takes whole numbers and ranges of them, such as --batches=1,8,32 and --seeds=0-4,100."""

    def parse(text: str) -> Iterable[int]:
        first, _, last = text.partition("-")
        numbers = range(int(first), int(last or first) + 1) if first.isdecimal() and (last or first).isdecimal() else ()
        if not numbers:
            raise ValueError(f"`{text}` is neither a number nor a range such as 0-4")
        if numbers[0] < lower_bound:
            raise ValueError(f"`{text}` is below {lower_bound}")
        return numbers

    return _define_list(name, default, text, parse, "whole numbers")


def define_floats(
    name: str, default: Sequence[float], text: str, *, lower_bound: float | None = None
) -> flags.FlagHolder[list[float]]:
    """A flag that takes finite numbers, such as --dram_gb=0,1000."""
    parser = _FiniteParser(lower_bound)
    return _define_list(name, default, text, lambda text: [parser.parse(text)], "numbers")


def define_timed_nodes(name: str, text: str) -> flags.FlagHolder[list[tuple[float, int]]]:
    """A flag that takes moments and nodes, such as --fail=60:3,200:9 for node 3 at 60 s and node 9 at 200 s."""

    def parse(text: str) -> Iterable[tuple[float, int]]:
        seconds, _, node = text.partition(":")
        try:
            return [(_FiniteParser(lower_bound=0.0).parse(seconds), int(node))]
        except ValueError:
            raise ValueError(f"`{text}` is not seconds:node, such as 60:3") from None

    return _define_list(name, [], text, parse, "seconds:node", lambda timed: f"{timed[0]}:{timed[1]}")


def define_names(name: str, default: Sequence[str], choices: Iterable[str], text: str) -> flags.FlagHolder[list[str]]:
    """A flag that takes some of `choices`, such as --method=hpgan,ga."""
    known = tuple(choices)

    def parse(text: str) -> Iterable[str]:
        if text not in known:
            near = difflib.get_close_matches(text, known, n=1)
            perhaps = f"perhaps {near[0]}; " if near else ""
            raise ValueError(f"`{text}` is unknown: {perhaps}known are {', '.join(known)}")
        return [text]

    return _define_list(name, default, text, parse, "names")


def define_texts(name: str, default: Sequence[str], text: str) -> flags.FlagHolder[list[str]]:
    """A flag that takes any texts without commas, such as --devices=h100,l40s."""
    return _define_list(name, default, text, lambda text: [text], "texts")


_ONE: flags.ArgumentSerializer = flags.ArgumentSerializer()


def _define_list(
    name: str,
    default: Sequence[T] | None,
    text: str,
    parse_one: Callable[[str], Iterable[T]],
    kind: str,
    to_text: Callable[[T], str] = str,
) -> flags.FlagHolder[list[T]]:
    parser = _ListParser(parse_one, kind, may_be_empty=default is not None and not default)
    # absl keeps the last of several --name=; a list given in parts is refused rather than cut.
    return flags.DEFINE(parser, name, default, text, serializer=_ListSerializer(to_text), allow_overwrite=False)
