"""What a node that dies takes with it: which requests lose by it, and which find another way."""

from collections.abc import Callable, Mapping

from serving.conductor import Conductor
from serving.simulator.cluster import Cluster
from serving.simulator.flight import Flight
from serving.simulator.nodes import PrefillSide


def lost_flights(
    cluster: Cluster,
    conductor: Conductor,
    flights: Mapping[str, Flight],
    node: int,
    now: float,
    send: Callable[[Flight, float, float], None],
) -> list[Flight]:
    """Requests that a node which has left takes with it, by arrival; each remembers the tokens that it has got.

    Args:
        flights: all that are on their way.
        send: sends a prompt's KV again, to the decode node that was found for it instead: (flight, since_s, now).
    """
    if cluster.prefills(node):
        lost = [*cluster.prefill[node].fail(now), *_cut_off(cluster, flights, node, now)]
    else:
        index = cluster.decode_index(node)
        lost = [*cluster.decode[index].fail(now), *_without_decode(cluster, conductor, flights, index, now, send)]
    return sorted(lost, key=lambda flight: flight.number)


def _cut_off(cluster: Cluster, flights: Mapping[str, Flight], prefill: int, now: float) -> list[Flight]:
    """Requests whose KV was on its way from a prefill node that died: to their decode node, or to be reused."""
    lost = []
    for flight in flights.values():
        if flight.placement.prefill == prefill and flight.arrives_s >= now:
            flight.remember([], flight.first_token_s)
            lost.append(flight)
        elif flight.pulls_from(prefill, now):
            _withdraw(cluster, flight, now)
            lost.append(flight)
    return lost


def _without_decode(
    cluster: Cluster,
    conductor: Conductor,
    flights: Mapping[str, Flight],
    decode: int,
    now: float,
    send: Callable[[Flight, float, float], None],
) -> list[Flight]:
    """Finds other decode nodes for requests promised to one that died; those for which there is none."""
    lost = []
    for flight in flights.values():
        if flight.placement.decode != decode or (flight.first_token_s and flight.arrives_s < now):
            continue
        placement = conductor.redirect(flight.request)
        if placement is None:
            lost.append(flight)
            continue
        cluster.end_promise(flight)
        flight.placement = placement
        cluster.promise(flight)
        if flight.first_token_s:
            send(flight, now, now)
    for flight in lost:
        if flight.first_token_s:
            flight.remember([], flight.first_token_s)
        else:
            _withdraw(cluster, flight, now)
    return lost


def _withdraw(cluster: Cluster, flight: Flight, now: float) -> None:
    """Takes an unfinished prefill back from a node, and with it the blocks that it would have brought."""
    placement = flight.placement
    node = cluster.prefill[placement.prefill]
    if isinstance(node, PrefillSide):
        node.withdraw(flight, now)
        cluster.rank(node)
        local = (placement.reused_tokens - placement.pulled_tokens) // cluster.view.block_size
        cluster.view.directory.remove(placement.prefill, node.cache.discard(flight.request.keys[local:]))
