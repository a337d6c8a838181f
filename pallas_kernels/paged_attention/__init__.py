"""Paged attention: one pool of pages a layer, ragged sequences packed on one token axis."""

from jaxserve.pallas_kernels.paged_attention.api import (
    IMPLEMENTATIONS,
    Implementation,
    choose,
    kv_write,
    paged_attention,
    rotate_and_write,
)
from jaxserve.pallas_kernels.paged_attention.pool import (
    PAGE_SIZES,
    is_quantized,
    largest,
    new_pool,
    pool_spec,
    storage_dtype,
    value_dtype,
)
from jaxserve.pallas_kernels.paged_attention.rotary import rotate
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec, Use

__all__ = [
    "IMPLEMENTATIONS",
    "PAGE_SIZES",
    "AttentionSpec",
    "Implementation",
    "Use",
    "choose",
    "is_quantized",
    "kv_write",
    "largest",
    "new_pool",
    "paged_attention",
    "pool_spec",
    "rotate",
    "rotate_and_write",
    "storage_dtype",
    "value_dtype",
]
