"""The engine of one model on one mesh, made in one call."""

from collections.abc import Iterable

from jax.sharding import Mesh

from kvcache.blocks import Namespace
from model.transformer import Transformer
from serving.engine.engine import Engine
from serving.engine.runner import ModelRunner
from serving.engine.types import EngineConfig


def build_engine(
    model: Transformer,
    config: EngineConfig,
    *,
    mesh: Mesh | None = None,
    eos_ids: Iterable[int] = (),
    namespace: Namespace | None = None,
) -> Engine:
    """Returns an `Engine` over a `ModelRunner` of `model`.

    Args:
        model: with its weights.
        config: sizes of the engine. Raises `EngineError` where its KV memory holds no page.
        mesh: devices to lay the model out over; `None` leaves it where it is. Raises `MeshError` where heads do not
            divide.
        eos_ids: token ids that end a sequence.
        namespace: as `Engine` takes it.
    """
    return Engine(ModelRunner(model, config, mesh), config, eos_ids=eos_ids, namespace=namespace)
