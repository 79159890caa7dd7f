"""Errors of the converter: which equation or argument, and what to do instead."""

from attention_offload.errors import OffloadError


class ConversionError(OffloadError):
    """A step that cannot be cut."""
