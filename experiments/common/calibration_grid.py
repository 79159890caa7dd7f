"""What a calibration asks of an engine: prompts, decode batches and mixtures that meet every shape of its steps."""

import dataclasses
import itertools

from serving.simulator.steps import EngineModel


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`tokens` tokens of which the first `cached` are computed beforehand, and so many tokens to generate.

    A `text` names the tokens, for prompts that are to stay cached from one scenario to the next; else they are new.
    """

    tokens: int
    outputs: int = 1
    cached: int = 0
    text: int | None = None


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Prompts that come to an idle engine: `first` together, `then` once all of those decode."""

    test: str
    first: tuple[Prompt, ...]
    then: tuple[Prompt, ...] = ()


def _sizes(start: int, end: int) -> list[int]:
    """Powers of two times `start` up to `end`, and `end`."""
    sizes = list(itertools.takewhile(lambda size: size < end, (start << i for i in itertools.count())))
    return [*sizes, end]


def scenarios(model: EngineModel) -> list[Scenario]:
    """A grid that meets every shape of the engine's steps."""
    page, budget, batch = model.page_size, model.token_budget, model.max_batch
    # What is generated never fills a page, so that the cache holds prompts alone, the same in each run.
    few, many = min(6, page - 2), min(16, page - 2)
    longest = min(model.max_model_len - many - 1, model.num_pages * page // 2)
    pages = min(longest, model.num_pages * page // (2 * batch)) // page
    contexts = sorted({max(1, pages * share // 4) * page + 1 for share in (1, 2, 4)})

    def decoding(size: int, context: int, outputs: int) -> tuple[Prompt, ...]:
        return tuple(Prompt(context, outputs, context - 1, text) for text in range(size))

    grid = []
    for tokens in _sizes(min(32, budget), longest):
        cached = {0, tokens // 2 // page * page, (tokens - 1) // page * page}
        grid += [Scenario("prefill", (Prompt(tokens, cached=reused),)) for reused in sorted(cached)]
    sizes = sorted({*_sizes(1, batch), *(size - size // 4 for size in _sizes(1, batch))})
    grid += [Scenario("decode", decoding(b, c, few)) for b, c in itertools.product(sizes, contexts)]
    for context, tokens in itertools.product(contexts[:2], _sizes(min(32, budget) // 2, 2 * budget)):
        grid.append(Scenario("mixed", decoding(max(1, batch // 2), context, many), (Prompt(min(tokens, longest)),)))
    for rows in _sizes(2, model.max_prefill_rows):
        several = (Prompt(max(1, budget // rows - 1)),) * rows
        grid.append(Scenario("prefill", several))
        grid.append(Scenario("mixed", decoding(2, contexts[0], many), several))
    return grid
