"""Paged attention on Hopper GPUs."""

from model.kernels.paged_attention.mosaic_gpu.backend import attend as attend
from model.kernels.paged_attention.mosaic_gpu.backend import unsupported as unsupported
