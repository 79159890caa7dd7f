"""Objectives of single codes: their exact values, the user's own, what a catalogue may name."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan import baselines, catalogue, surrogate
from gan.objectives import CodeObjective
from gan.sequences.figures import code_figures
from gan.surrogate import SurrogateSettings

pytestmark = pytest.mark.usefixtures("quick_compilation")


def balance(codes: jax.Array) -> jax.Array:
    """Larger for a code with as many + as -, which no symmetry of correlations keeps."""
    return -jnp.abs(codes.sum(-1))


@pytest.mark.parametrize(("objective", "best"), [("psl", 13.0), ("merit_factor", 169 / 12)])
def test_barker_13_is_found_and_certified(objective: str, best: float) -> None:
    case = CodeObjective(13, objective, goal=best)
    result = baselines.METHODS["tabu"](case, 100_000, 0, stop_at=best)
    assert result.best == pytest.approx(best, rel=1e-5)
    assert result.entries[0].hit
    entry = catalogue.check(json.dumps(result.entries[0].to_json()))
    figures = code_figures(entry.code)
    assert entry.value == {"psl": 13 / figures.psl, "merit_factor": figures.merit_factor}[objective]


def test_the_users_own_objective_is_searched_but_not_imported_from_a_catalogue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(balance=balance))
    case = CodeObjective(8, "mine:balance")
    result = surrogate.run(case, 300, 0, stop_at=0.0, settings=SurrogateSettings(elites=16, children=8, screening=2))
    assert result.best == 0 == result.best_code.sum()
    codes = case.random(np.random.default_rng(0), 20)
    np.testing.assert_array_equal(case.gauge(codes), codes)  # no symmetry of it is known
    assert len(set(case.class_ids(codes))) == len(np.unique(codes, axis=0))
    with pytest.raises(ValueError, match="names no built-in objective"):
        catalogue.check(json.dumps(result.entries[0].to_json()))


@pytest.mark.parametrize(("name", "message"), [("snr", "must be one of psl"), ("gan:nothing", "cannot be imported")])
def test_unknown_objectives_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeObjective(13, name)
