"""Catalogues of found codes: JSON Lines, one code a line, every line checkable by itself."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gan.problems import Problem, problem

_FIELDS = ("problem", "length", "sequences", "value", "class_id", "method", "evaluation")


class CatalogueError(ValueError):
    """A line of a catalogue is malformed or claims what is not so."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One found code: what it solves, its exact value rounded once to float64, its class, who found it and when."""

    problem: Problem
    code: np.ndarray
    value: float
    class_id: str
    method: str
    evaluation: int

    def to_json(self) -> dict[str, Any]:
        """The line's object; parameters of the problem (`kind`, `flocks`) stand beside its name."""
        parameters = {name: value for name, value in self.problem.parameters.items() if name != "sequences"}
        return {
            "problem": self.problem.name,
            **parameters,
            "length": self.problem.length,
            "sequences": self.problem.to_text(self.code),
            "value": self.value,
            "class_id": self.class_id,
            "method": self.method,
            "evaluation": self.evaluation,
        }


def certified(problem: Problem, codes: np.ndarray, method: str, evaluations: np.ndarray) -> list[Entry]:
    """The entries of codes int8 `[B, chips]` found at `evaluations` `[B]`, their values computed exactly."""
    rows = zip(codes, problem.values(codes), problem.class_ids(codes), evaluations.tolist(), strict=True)
    return [Entry(problem, code, value, class_id, method, at) for code, value, class_id, at in rows]


def write(path: str | os.PathLike[str], entries: Iterable[Entry]) -> int:
    """Writes a catalogue, whole or not at all; returns the number of lines."""
    lines = [json.dumps(entry.to_json()) + "\n" for entry in entries]
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines))
    os.replace(partial, path)
    return len(lines)


def read(path: str | os.PathLike[str]) -> Iterator[Entry]:
    """The entries of a catalogue, each re-checked exactly: symbols, lengths, value and class.

    Raises:
        CatalogueError: with the number of the first bad line and what is wrong with it.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield check(line)
            except ValueError as error:
                raise CatalogueError(f"{path}, line {number}: {error}") from error


def check(line: str) -> Entry:
    """The entry of one line, re-checked exactly.

    Raises:
        ValueError: if the line is malformed, or its code does not have the value and the class that it states.
    """
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, is {type(fields).__name__}.")
    if missing := [name for name in _FIELDS if name not in fields]:
        raise ValueError(f"lacks `{missing[0]}`.")
    for name, kind in {"length": int, "sequences": list, "value": float, "method": str, "evaluation": int}.items():
        if not isinstance(fields[name], (int, float) if kind is float else kind) or isinstance(fields[name], bool):
            raise ValueError(f"`{name}` must be {kind.__name__}, is {fields[name]!r}.")
    if fields["evaluation"] < 0:
        raise ValueError(f"`evaluation` is {fields['evaluation']}; it must not be negative.")
    claimed = _problem_of(fields)
    code = claimed.from_text(fields["sequences"])
    (entry,) = certified(claimed, code[None], fields["method"], np.array([fields["evaluation"]]))
    if entry.value != fields["value"]:
        raise ValueError(f"`value` is {fields['value']!r}, but the code has {entry.value!r}.")
    if entry.class_id != fields["class_id"]:
        raise ValueError(f"`class_id` is {fields['class_id']!r}, but the code is of class {entry.class_id}.")
    return entry


def _problem_of(fields: dict[str, Any]) -> Problem:
    parameters = {name: value for name, value in fields.items() if name not in _FIELDS}
    if wrong := [name for name, value in parameters.items() if type(value) is not int]:
        raise ValueError(f"`{wrong[0]}` must be an integer, is {parameters[wrong[0]]!r}.")
    if not all(isinstance(text, str) for text in fields["sequences"]):
        raise ValueError("`sequences` must hold text.")
    if "flocks" in parameters and parameters["flocks"] > 0:
        parameters["sequences"] = len(fields["sequences"]) // parameters["flocks"]
    return problem(fields["problem"], fields["length"], **parameters)
