"""The error of this package."""


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or not of the model that its config describes."""
