"""The flag that spreads a model over devices, under one name and one meaning."""

import math

import jax
from absl import flags
from jax.sharding import Mesh

from model.sharding import mesh_sizes, parse_mesh

MESH = flags.DEFINE_string(
    "mesh", None, "Devices to spread the model over, such as tp:4; by default the first device alone."
)


def make_mesh(text: str | None) -> Mesh | None:
    """The mesh that `text`, such as tp:4, names. Call it before anything else touches a device. Raises `MeshError`.

    Where there is no accelerator, that many CPU devices are made, so every mesh can be tried on a laptop.
    """
    if text is None:
        return None
    jax.config.update("jax_num_cpu_devices", math.prod(mesh_sizes(text).values()))
    return parse_mesh(text)


def flagged_mesh() -> Mesh | None:
    """The mesh named by `--mesh`; see `make_mesh`."""
    return make_mesh(MESH.value)
