"""The tiny model of the server's tests."""

from tests.serving.api.conftest import tiny_model as tiny_model
