"""What a node that dies takes with it: which requests lose by it, and which find another way."""

from collections.abc import Callable, Mapping

from serving.conductor import Conductor
from serving.simulator.cluster import Cluster
from serving.simulator.nodes import PrefillNode
from serving.simulator.request_state import RequestState


def lost_requests(
    cluster: Cluster,
    conductor: Conductor,
    states: Mapping[str, RequestState],
    node: int,
    now: float,
    send: Callable[[RequestState, float, float], None],
) -> list[RequestState]:
    """Requests that a node which has left takes with it, by arrival; each remembers the tokens that it has got.

    Args:
        states: all that are on their way.
        send: sends a prompt's KV again, to the decode node that was found for it instead: (state, since_s, now).
    """
    if cluster.prefills(node):
        lost = [*cluster.prefill[node].fail(now), *_cut_off(cluster, states, node, now)]
    else:
        index = cluster.decode_index(node)
        lost = [*cluster.decode[index].fail(now), *_without_decode(cluster, conductor, states, index, now, send)]
    return sorted(lost, key=lambda state: state.number)


def _cut_off(cluster: Cluster, states: Mapping[str, RequestState], prefill: int, now: float) -> list[RequestState]:
    """Requests whose KV was on its way from a prefill node that died: to their decode node, or to be reused."""
    lost = []
    for state in states.values():
        if state.placement.prefill == prefill and state.arrives_s >= now:
            state.remember([], state.first_token_s)
            lost.append(state)
        elif state.fetches_from(prefill, now):
            _withdraw(cluster, state, now)
            lost.append(state)
    return lost


def _without_decode(
    cluster: Cluster,
    conductor: Conductor,
    states: Mapping[str, RequestState],
    decode: int,
    now: float,
    send: Callable[[RequestState, float, float], None],
) -> list[RequestState]:
    """Finds other decode nodes for requests promised to one that died; those for which there is none."""
    lost = []
    for state in states.values():
        if state.placement.decode != decode or (state.first_token_s and state.arrives_s < now):
            continue
        placement = conductor.redirect(state.request)
        if placement is None:
            lost.append(state)
            continue
        cluster.release(state)
        state.placement = placement
        cluster.reserve(state)
        if state.first_token_s:
            send(state, now, now)
    for state in lost:
        if state.first_token_s:
            state.remember([], state.first_token_s)
        else:
            _withdraw(cluster, state, now)
    return lost


def _withdraw(cluster: Cluster, state: RequestState, now: float) -> None:
    """Takes an unfinished prefill back from a node, and with it the blocks that it would have brought."""
    placement = state.placement
    node = cluster.prefill[placement.prefill]
    if isinstance(node, PrefillNode):
        node.withdraw(state, now)
        cluster.rank(node)
        local = (placement.reused_tokens - placement.fetched_tokens) // cluster.view.block_size
        cluster.view.directory.remove(placement.prefill, node.cache.discard(state.request.keys[local:]))
