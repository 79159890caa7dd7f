"""Catalogues of found codes: JSON Lines, one code a line, every line checkable by itself."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gan.objectives import OBJECTIVES, CodeObjective
from gan.problems import Problem, problem

_FIELDS = ("problem", "length", "sequences", "value", "hit", "class_id", "method", "seed", "evaluation")
_KINDS = {
    "length": int,
    "sequences": list,
    "value": float,
    "hit": bool,
    "method": str,
    "seed": int,
    "evaluation": int,
}


class CatalogueError(ValueError):
    """A line of a catalogue is malformed or claims what is not so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One found code, and who found it.

    Attributes:
        value: exact, rounded once to float64.
        hit: whether the value reached the target of the search, which for an SIR depends on what was known then; the
            best code of a search without a hit is no hit.
        evaluation: its number in the search.
    """

    problem: Problem
    code: np.ndarray
    value: float
    hit: bool
    class_id: str
    method: str
    seed: int
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
            "hit": self.hit,
            "class_id": self.class_id,
            "method": self.method,
            "seed": self.seed,
            "evaluation": self.evaluation,
        }


def certified(problem: Problem, codes: np.ndarray, *, method: str, seed: int, evaluations: np.ndarray) -> list[Entry]:
    """The entries of codes int8 `[B, chips]` found at `evaluations` `[B]`, their values computed exactly."""
    rows = zip(codes, problem.values(codes), problem.class_ids(codes), evaluations.tolist(), strict=True)
    return [
        Entry(
            problem=problem,
            code=code,
            value=value,
            hit=bool(problem.is_hit(value)),
            class_id=class_id,
            method=method,
            seed=seed,
            evaluation=evaluation,
        )
        for code, value, class_id, evaluation in rows
    ]


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
    for name, kind in _KINDS.items():
        numeric = kind is not bool and isinstance(fields[name], bool)
        if numeric or not isinstance(fields[name], (int, float) if kind is float else kind):
            raise ValueError(f"`{name}` must be {kind.__name__}, is {fields[name]!r}.")
    for name in ("evaluation", "seed"):
        if fields[name] < 0:
            raise ValueError(f"`{name}` is {fields[name]}; it must not be negative.")
    claimed = _problem_of(fields)
    code = claimed.from_text(fields["sequences"])
    (entry,) = certified(
        claimed,
        code[None],
        method=fields["method"],
        seed=fields["seed"],
        evaluations=np.array([fields["evaluation"]]),
    )
    entry = dataclasses.replace(entry, hit=fields["hit"])
    if entry.value != fields["value"]:
        raise ValueError(f"`value` is {fields['value']!r}, but the code has {entry.value!r}.")
    if entry.class_id != fields["class_id"]:
        raise ValueError(f"`class_id` is {fields['class_id']!r}, but the code is of class {entry.class_id}.")
    return entry


def _problem_of(fields: dict[str, Any]) -> Problem:
    parameters = {name: value for name, value in fields.items() if name not in _FIELDS}
    if fields["problem"] == CodeObjective.name:
        return _code_of(fields["length"], parameters)
    if wrong := [name for name, value in parameters.items() if type(value) is not int]:
        raise ValueError(f"`{wrong[0]}` must be an integer, is {parameters[wrong[0]]!r}.")
    if not all(isinstance(text, str) for text in fields["sequences"]):
        raise ValueError("`sequences` must hold text.")
    if "flocks" in parameters and parameters["flocks"] > 0:
        parameters["sequences"] = len(fields["sequences"]) // parameters["flocks"]
    return problem(fields["problem"], fields["length"], **parameters)


def _code_of(length: int, parameters: dict[str, Any]) -> CodeObjective:
    """A code of a built-in objective; a catalogue may come from anyone, so that what it names is not imported."""
    if set(parameters) != {"objective"} or parameters["objective"] not in OBJECTIVES:
        raise ValueError(f"{parameters} names no built-in objective ({', '.join(OBJECTIVES)}): it cannot be checked.")
    return CodeObjective(length, parameters["objective"])
