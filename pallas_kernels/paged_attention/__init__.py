"""Paged attention: one pool of pages a layer, ragged sequences packed on one token axis."""

from pallas_kernels.paged_attention.api import IMPLEMENTATIONS, Implementation, choose, kv_write, paged_attention
from pallas_kernels.paged_attention.pool import PAGE_SIZES, new_pool, pool_spec, storage_dtype
from pallas_kernels.paged_attention.spec import AttentionSpec

__all__ = [
    "IMPLEMENTATIONS",
    "PAGE_SIZES",
    "AttentionSpec",
    "Implementation",
    "choose",
    "kv_write",
    "new_pool",
    "paged_attention",
    "pool_spec",
    "storage_dtype",
]
