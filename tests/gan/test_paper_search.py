"""The paper's loop: it stays in its budget, pays for guidance, repeats by seed and gives up when nothing is new."""

import pytest

from gan import paper_search
from gan.paper_search import PaperConfig
from gan.problems import problem
from gan.training import GanConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = PaperConfig(start=200, elites=50, steps=10, samples=100)


def test_one_seed_is_one_run_within_its_budget() -> None:
    mmf = problem("mmf", 13)
    first, second = (paper_search.run(mmf, 600, seed=1, config=SMALL) for _ in range(2))
    assert first.evaluations == second.evaluations == 600
    assert first.curve == second.curve
    assert first.method == "hpgan_paper"


def test_guidance_is_paid_for() -> None:
    guided = PaperConfig(
        start=100, elites=25, steps=2, samples=50, gan=GanConfig(codec="rank1", guidance=1.0, batch=16)
    )
    seen: list[int] = []
    paper_search.run(
        problem("mmf", 31), 400, seed=0, progress=lambda evaluations, _: seen.append(evaluations), config=guided
    )
    assert seen[:2] == [80, 80 + 2 * 2 * 16]  # a fifth of the budget to start with, then two steps on sixteen codes


def test_it_gives_up_when_every_code_is_known() -> None:
    result = paper_search.run(problem("mmf", 5), 5000, seed=0, config=SMALL)
    assert result.evaluations == 2**3  # the first two chips are gauge
    assert result.best == pytest.approx(13)
