"""The one import of Pallas' Triton backend.

From jax 0.11 on the backend warns at each lowering that it is deprecated. This project uses it knowingly and keeps it
behind `api.IMPLEMENTATIONS`, so that another backend can stand beside it; that one warning is silenced here.
"""

import warnings

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

DEPRECATION = "The Pallas Triton backend is deprecated"

warnings.filterwarnings("ignore", message=DEPRECATION, category=DeprecationWarning)

__all__ = ["DEPRECATION", "pl", "triton"]
