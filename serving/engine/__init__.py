"""Continuous batching over a paged KV cache on one mesh (floor 3).

What needs no device is exported here; `serving.engine.build` makes an engine of a model, and imports JAX.
"""

from serving.engine.errors import EngineError as EngineError
from serving.engine.errors import RequestRefusedError as RequestRefusedError
from serving.engine.types import EngineConfig as EngineConfig
from serving.engine.types import EngineStats as EngineStats
from serving.engine.types import Generation as Generation
from serving.engine.types import TokenEvent as TokenEvent
