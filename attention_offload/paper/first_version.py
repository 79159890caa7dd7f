"""The first version of the paper (May 2024): attention on consumer GPUs, "1.48x-12.1x" estimated throughput per dollar.

Its tables were not at hand. The claim is bracketed: one H100 with k RTX 3090 against one H100, at every price that was
common then, for contexts of a chat. What decides is how much memory the weights leave on the H100.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from attention_offload.costs.deployments import CoupledDeployment, OffloadedDeployment
from attention_offload.costs.knobs import A_PRIORI
from attention_offload.costs.model_table import load_shape
from attention_offload.devices import load_devices
from attention_offload.paper.setups import fullest_step
from papers.comparison import NOT_REPRODUCED, ORDER_ONLY, Comparison, PaperTable, statement

H100_PRICES = (2.5, 4.0, 11.06)
CONSUMER_PRICES = (0.22, 0.44)
CONTEXTS = (1024, 2048)
_CLAIM = (1.48, 12.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio:
    """Offloaded over coupled, for one setting."""

    model: str
    attention_devices: int
    context: int
    h100_price: float
    consumer_price: float
    batch: float
    tok_per_dollar: float


def ratios(model: str, count: int) -> list[Ratio]:
    """Batch and throughput-per-dollar ratios of one H100 with `count` RTX 3090 to one H100, at every price and context.

    Attention divides by request, as heads rarely divide by the number of cards.
    """
    shape, table = load_shape(model), load_devices()
    rows = []
    for context, h100_price, price in itertools.product(CONTEXTS, H100_PRICES, CONSUMER_PRICES):
        h100 = dataclasses.replace(table["h100"], price_per_hour=h100_price)
        card = dataclasses.replace(table["rtx3090"], price_per_hour=price)
        alone = CoupledDeployment(h100, 1)
        pool = OffloadedDeployment(
            dense=h100, dense_count=1, attention=card, attention_count=count, partition="request"
        )
        before = fullest_step(alone, shape, context, A_PRIORI)
        after = fullest_step(pool, shape, context, A_PRIORI)
        value = after.tokens_per_s / pool.price_per_hour / (before.tokens_per_s / alone.price_per_hour)
        rows.append(
            Ratio(
                model=model,
                attention_devices=count,
                context=context,
                h100_price=h100_price,
                consumer_price=price,
                batch=after.batch / before.batch,
                tok_per_dollar=value,
            )
        )
    return rows


def first_version() -> PaperTable:
    """Where the claimed range lies among pools of 4 to 16 cards."""
    rows: list[Comparison] = []
    curves: list[Mapping[str, Any]] = []
    for model in ("llama-13b", "llama-33b"):
        for count in (4, 8, 16):
            found = ratios(model, count)
            low, high = (f(row.tok_per_dollar for row in found) for f in (min, max))
            batches = [row.batch for row in found]
            note = f"H100 ${H100_PRICES[0]}-{H100_PRICES[-1]}/h, RTX 3090 ${CONSUMER_PRICES[0]}-{CONSUMER_PRICES[-1]}/h"
            note += f"; batch x{min(batches):.1f}-{max(batches):.1f}"
            claim = f"{_CLAIM[0]}x ... {_CLAIM[1]}x"
            verdict = ORDER_ONLY if low > 1 else NOT_REPRODUCED
            rows.append(
                Comparison(
                    item=f"{model}, {count} cards",
                    paper=claim,
                    ours=f"{low:.2f}x ... {high:.2f}x",
                    verdict=verdict,
                    note=note,
                )
            )
            curves += [
                {"figure": "v1", "series": model, "x_name": "cards", "x": count, "y_name": "throughput per dollar (x)"}
                | {"y": row.tok_per_dollar}
                | dataclasses.asdict(row)
                for row in found
            ]
    values = [curve["y"] for curve in curves]
    rows.append(
        statement(
            f"the claimed {_CLAIM[0]}x-{_CLAIM[1]}x lies within what these settings give",
            min(values) <= _CLAIM[0] and max(values) >= _CLAIM[1],
            f"{min(values):.2f}x ... {max(values):.2f}x over all settings; a bracket, not a reproduction",
        )
    )
    return PaperTable("v1: throughput per dollar with consumer GPUs (a priori)", tuple(rows), tuple(curves))
