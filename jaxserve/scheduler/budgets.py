"""Keeps the limits in force: those of the settings, as adjusted by adaptation."""

from __future__ import annotations

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.scheduler.adaptation import AdaptiveBatchSize, LoadProfile


class Budgets:
    """Holds the limits as of the last `update`.

    max_num_seqs, max_num_batched_tokens, prefill_share: as in `SchedulerConfig`. chunked: its enable_chunked_prefill.
    profile: name of the load-dependent profile, or "".
    """

    def __init__(self, config: SchedulerConfig):
        self._config = config
        adaptation = config.adaptation
        self._batch_size = AdaptiveBatchSize(adaptation) if adaptation.adaptive_batch_size else None
        self._profile = LoadProfile(adaptation) if adaptation.load_profile else None
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.prefill_share = config.admission.prefill_share
        self.chunked = config.enable_chunked_prefill
        self.profile = ""

    def arrived(self, prompt_tokens: int) -> None:
        """Updates the limits for a request that arrived."""
        if self._batch_size is not None:
            self._batch_size.observe(prompt_tokens)
            self.max_num_seqs = min(self._config.max_num_seqs, self._batch_size.limit)

    def update(self, unfinished: int) -> None:
        """Updates the limits at the start of a step, given the number of unfinished requests."""
        if self._profile is not None:
            profile = self._profile.update(unfinished / self._config.max_num_seqs)
            self.profile = profile.name
            self.max_num_batched_tokens = min(self._config.max_num_batched_tokens, profile.max_num_batched_tokens)
            self.prefill_share = min(self._config.admission.prefill_share, profile.prefill_share)
            self.chunked = profile.enable_chunked_prefill and self._config.enable_chunked_prefill
