"""Builds a model weight by weight, each laid out on its devices as it arrives.

A weight's name is its path in the module tree, joined by dots: "layers.0.self_attn.q_proj.weight".
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from model.config import ModelConfig
from model.sharding import check_mesh, weight_sharding
from model.transformer import Transformer


def abstract_weights(config: ModelConfig, dtype: Any, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every weight, by name. Raises `MeshError`."""
    if mesh is not None:
        check_mesh(config, mesh)
    _, state = nnx.split(_abstract(config, dtype))
    return {
        _name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(mesh, leaf))
        for path, leaf in nnx.to_flat_state(state)
    }


def build(config: ModelConfig, dtype: Any, weight: Callable[[str], jax.Array]) -> Transformer:
    """A model whose weights are what `weight` returns for each name."""
    graph, state = nnx.split(_abstract(config, dtype))
    flat = [(path, leaf.replace(weight(_name(path)))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def named_weights(model: Transformer) -> Iterator[tuple[str, jax.Array]]:
    """Every weight with its name."""
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        yield _name(path), leaf[...]


def _abstract(config: ModelConfig, dtype: Any) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), dtype))


def _name(path: Sequence[Any]) -> str:
    return ".".join(str(part) for part in path)


def _sharding(mesh: Mesh | None, leaf: nnx.Variable) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return weight_sharding(mesh, leaf.axes, leaf.shape)
