"""Attention over a paged KV cache: one function, one backend per kind of device."""

from model.kernels.paged_attention.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from model.kernels.paged_attention.api import paged_attention as paged_attention
from model.kernels.paged_attention.api import write_and_attend as write_and_attend
from model.kernels.paged_attention.api import write_kv as write_kv
from model.kernels.paged_attention.merge import merge as merge
from model.kernels.paged_attention.pages import read_pages as read_pages
from model.kernels.paged_attention.pages import write_pages as write_pages
from model.kernels.paged_attention.problem import KVPool as KVPool
from model.kernels.paged_attention.problem import TileSizes as TileSizes
from model.kernels.pool_shape import pool_shape as pool_shape
from model.kernels.pool_shape import scales_shape as scales_shape
