"""Holds the device's state of the running requests: one row of each array for a request's whole run.

The host sends differences only (`layout.forward_layout`): the parameters of a newly admitted request, and the pages
that its table gained. The arrays are donated from step to step and never read back.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxserve.sampling_params import ADMITTED_FIELDS, APART_FIELDS


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["last_token", "page_table", "sampling"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Slots:
    """Holds S slots with page tables of at most P pages, one for each of G groups of layers.

    Attributes:
        last_token: int32 [S], the id sampled last.
        page_table: int32 [S, P], or [G, S, P] of more than one group; entries past a request's length, or before its
            window, are stale.
        sampling: for each of `ADMITTED_FIELDS` and `APART_FIELDS` an array [S] or [S, width], written once, at
            admission; the latter only for requests that set them.
    """

    last_token: jax.Array
    page_table: jax.Array
    sampling: dict[str, jax.Array]

    @classmethod
    def zeros(cls, num_slots: int, max_pages: int, num_groups: int = 1) -> Slots:
        """Creates unused slots."""
        sampling = {
            name: jnp.full((num_slots,) if value.width is None else (num_slots, value.width), value.idle, value.dtype)
            for name, value in {**ADMITTED_FIELDS, **APART_FIELDS}.items()
        }
        return cls(
            last_token=jnp.zeros((num_slots,), jnp.int32),
            page_table=jnp.zeros((*([num_groups] if num_groups > 1 else []), num_slots, max_pages), jnp.int32),
            sampling=sampling,
        )

    @property
    def num_groups(self) -> int:
        """Returns the number of groups of layers."""
        return 1 if self.page_table.ndim == 2 else self.page_table.shape[0]

    @property
    def tables(self) -> list[jax.Array]:
        """Returns the page table of each group, int32 [S, P]."""
        return [self.page_table] if self.page_table.ndim == 2 else list(self.page_table)

    def apply(self, fields: dict[str, jax.Array]) -> Slots:
        """Applies the differences of a step; entries whose slot is out of range are padding and dropped."""
        admit = fields["admit_slot"]
        sampling = self.sampling | {
            name: self.sampling[name].at[admit].set(fields[name], mode="drop") for name in ADMITTED_FIELDS
        }
        # All groups gain the same entries: in front of the last two axes there is one of groups, or none.
        page_table = self.page_table.at[..., fields["page_slot"], fields["page_index"]].set(fields["page"], mode="drop")
        return dataclasses.replace(self, page_table=page_table, sampling=sampling)
