"""The device's record of the running requests: one row of each array for a request's whole run.

The host sends differences only (`layout.forward_layout`): the parameters of a newly admitted request, and the pages
that its table gained. The arrays are donated from step to step and never read back.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxserve.programs.layout import STOP_WIDTH

PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "seed", "stop_token_ids")
"""Fields written once, at admission."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["last_token", "page_table", *PARAMETERS],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Slots:
    """S slots, P pages a table at most.

    last_token: int32 [S], the id sampled last. page_table: int32 [S, P]; entries past a request's length are stale.
    temperature, top_p, min_p: float32 [S]; top_k: int32 [S], 0 or less keeps all; seed: uint32 [S, 2], high word first.
    stop_token_ids: int32 [S, STOP_WIDTH], unused ones -1.
    """

    last_token: jax.Array
    page_table: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    stop_token_ids: jax.Array

    @classmethod
    def zeros(cls, num_slots: int, max_pages: int) -> Slots:
        return cls(
            last_token=jnp.zeros((num_slots,), jnp.int32),
            page_table=jnp.zeros((num_slots, max_pages), jnp.int32),
            temperature=jnp.zeros((num_slots,), jnp.float32),
            top_k=jnp.zeros((num_slots,), jnp.int32),
            top_p=jnp.ones((num_slots,), jnp.float32),
            min_p=jnp.zeros((num_slots,), jnp.float32),
            seed=jnp.zeros((num_slots, 2), jnp.uint32),
            stop_token_ids=jnp.full((num_slots, STOP_WIDTH), -1, jnp.int32),
        )

    def apply(self, fields: dict[str, jax.Array]) -> Slots:
        """The slots after the differences of a step; entries whose slot is out of range are padding and dropped."""
        admit = fields["admit_slot"]
        written = {name: getattr(self, name).at[admit].set(fields[name], mode="drop") for name in PARAMETERS}
        page_table = self.page_table.at[fields["page_slot"], fields["page_index"]].set(fields["page"], mode="drop")
        return dataclasses.replace(self, page_table=page_table, **written)
