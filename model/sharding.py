"""Tensor parallelism: which mesh axis each logical axis of the model is split over, and nothing else.

Weights are split as in Megatron-LM (arXiv:1909.08053): attention by head, the MLP by its intermediate axis, embeddings
by vocabulary. The KV cache is split by KV head, so attention needs no communication: each device runs the kernel on its
own heads (`shard_attend`). XLA inserts the two all-reduces per layer.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from model.config import ModelConfig
from model.transformer import Attend, Transformer

MESH_AXES = ("dp", "tp")
"""Data parallel (batches in training; weights are replicated) and tensor parallel."""

RULES: dict[str, str | None] = {
    "vocab": "tp",
    "heads": "tp",
    "kv_heads": "tp",
    "mlp": "tp",
    "experts": None,
    "embed": None,
    "head_dim": None,
}
"""Logical axis of a weight to mesh axis; None is replicated."""

KV_SPEC = PartitionSpec(None, "tp")
"""Of K and V pools [pages, kv_heads, page_size, head_dim]."""


class MeshError(ValueError):
    """A mesh cannot be made on this machine or does not fit the model."""


def mesh_sizes(text: str) -> dict[str, int]:
    """Size of each of `MESH_AXES` in the text of a `--mesh` flag. Raises `MeshError` for what is not such a text."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        if name not in sizes or not size.isdecimal() or int(size) < 1:
            raise MeshError(f"`{part}` of mesh `{text}` is not axis:size with an axis of {', '.join(MESH_AXES)}.")
        sizes[name] = int(size)
    return sizes


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh that a `--mesh` flag names: "tp:4", or "dp:2,tp:4"; axes left out have size 1.

    Raises:
      MeshError: for a syntax error, an unknown axis, or more devices than there are.
    """
    sizes = mesh_sizes(text)
    devices = jax.devices() if devices is None else devices
    count = math.prod(sizes.values())
    if count > len(devices):
        raise MeshError(
            f"Mesh `{text}` needs {count} devices and there are {len(devices)} ({devices[0].platform}). "
            "On CPU, `JAX_NUM_CPU_DEVICES` sets how many there are."
        )
    # Auto axes: XLA propagates the shardings of weights and cache; only attention is mapped by hand.
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices[:count])


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Refuses, with the numbers, a mesh whose `tp` axis does not divide what it splits. A vocabulary may stay whole."""
    tp = mesh.shape["tp"]
    sizes = {
        "attention heads": config.num_heads,
        "KV heads": config.num_kv_heads,
        "intermediate size": config.intermediate_size,
        "intermediate size of an expert": config.moe_intermediate_size,
    }
    if wrong := [f"{size} ({name})" for name, size in sizes.items() if size % tp]:
        raise MeshError(f"Tensor parallelism over {tp} devices does not divide {', '.join(wrong)} of this model.")


def weight_sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """The sharding of a weight with the logical `axes`; a dimension that does not divide stays whole."""
    names = [RULES[axis] for axis in axes]
    whole = [name is None or size % mesh.shape[name] for name, size in zip(names, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*(None if w else name for name, w in zip(names, whole, strict=True))))


def shard_model(model: Transformer, mesh: Mesh) -> Transformer:
    """The same model with every weight laid out over the mesh. Raises `MeshError` where it does not fit."""
    check_mesh(model.config, mesh)
    graph, state = nnx.split(model)
    placed = jax.tree.map(
        lambda leaf: leaf.replace(jax.device_put(leaf[...], weight_sharding(mesh, leaf.axes, leaf.shape))),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return nnx.merge(graph, placed)


def shard_attend(attend: Attend, mesh: Mesh | None, kv_spec: Any = KV_SPEC) -> Attend:
    """An `attend` that runs on each device of `tp` with that device's heads: a kernel needs no partitioning rule.

    Inside, q holds heads / tp heads and k, v and the pools kv_heads / tp. Arrays that `attend` closes over (page table,
    lengths) arrive whole on every device.

    Args:
      attend: attention with any leading axes; `mesh` None returns it as it is.
      kv_spec: PartitionSpecs of `kv`, as a tree prefix; the default splits every array of it by its second axis.
    """
    if mesh is None:
        return attend

    def sharded(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, kv: Any) -> tuple[jax.Array, Any]:
        by_head = PartitionSpec(*(None,) * (q.ndim - 2), "tp")
        mapped = jax.shard_map(
            lambda q, k, v, kv: attend(layer, q, k, v, kv),
            mesh=mesh,
            in_specs=(by_head, by_head, by_head, kv_spec),
            out_specs=(by_head, kv_spec),
            axis_names={"tp"},
            check_vma=False,  # Pallas and FFI kernels do not say over which axes their results vary.
        )
        return mapped(q, k, v, kv)

    return sharded
