"""Replays a workload in real time against any OpenAI-compatible server, over HTTP and `/metrics` alone."""

from serving.replay.client import ServedModel as ServedModel
from serving.replay.client import ServerClient as ServerClient
from serving.replay.errors import ReplayError as ReplayError
from serving.replay.replayer import Replay as Replay
from serving.replay.replayer import replay as replay
