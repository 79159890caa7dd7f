"""Checkpoints in two formats: Hugging Face folders (`load_hf`, `save_hf`) and Orbax (`save`, `restore`)."""

from model.checkpoints.errors import CheckpointError as CheckpointError
from model.checkpoints.fingerprint import fingerprint as fingerprint
from model.checkpoints.hf import load_hf as load_hf
from model.checkpoints.hf import save_hf as save_hf
from model.checkpoints.load import load as load
from model.checkpoints.native import restore as restore
from model.checkpoints.native import save as save
