"""Every table and figure by the name that `lamina_paper --table=` takes."""

from collections.abc import Callable, Mapping

from attention_offload.costs.knobs import FITTED
from attention_offload.costs.workloads import DecodeWorkload
from attention_offload.errors import OffloadError
from attention_offload.paper import breakdown, first_version, inputs, profiles, throughput
from papers.comparison import PaperTable

Traces = Mapping[str, tuple[int, DecodeWorkload]]

_TABLES: Mapping[str, Callable[[Traces], PaperTable]] = {
    "1": lambda _: inputs.table_1(),
    "3": lambda _: inputs.table_3(),
    "4": inputs.table_4,
    "5": lambda _: inputs.table_5(),
    "fig2": lambda _: profiles.figure_2(FITTED),
    "fig3": lambda _: profiles.figure_3(FITTED),
    "fig4": lambda _: profiles.figure_4(FITTED),
    "fig10": lambda _: throughput.figure_10(),
    "fig11": lambda _: throughput.figure_11(),
    "fig12": lambda _: breakdown.figure_12(),
    "fig13": lambda _: inputs.figure_13(),
    "fig14": lambda _: breakdown.figure_14(),
    "v1": lambda _: first_version.first_version(),
    "sensitivity": lambda _: throughput.sensitivity(),
}
NAMES = tuple(_TABLES)


def paper_table(name: str, traces: Traces) -> PaperTable:
    """The table or figure `name`; `traces` are those at hand, for Table 4. Raises `OffloadError` for unknown names."""
    if name not in _TABLES:
        raise OffloadError(f"No table `{name}`; known: {', '.join(NAMES)}.")
    return _TABLES[name](traces)
