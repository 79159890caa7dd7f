"""Flags of the scripts that run a model, under one name and one meaning."""

import math

import jax
from absl import flags
from jax.sharding import Mesh

from model.sharding import mesh_sizes, parse_mesh

MESH = flags.DEFINE_string("mesh", None, "Devices to spread the model over, such as tp:4; the first device if absent.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Of the weights; as they are stored if absent."
)


def flagged_mesh() -> Mesh | None:
    """The mesh named by `--mesh`. Call it before anything else touches a device.

    Where there is no accelerator, that many CPU devices are made, so every mesh can be tried on a laptop.
    """
    if MESH.value is None:
        return None
    jax.config.update("jax_num_cpu_devices", math.prod(mesh_sizes(MESH.value).values()))
    return parse_mesh(MESH.value)
