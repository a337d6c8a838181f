"""Defines every setting of the scheduler, as frozen dataclasses that validate themselves. Standard library only.

A section for each part of the scheduler; docs/scheduling.md says which to choose when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxserve.config.checks import at_least, between, one_of

MIN_BUCKET = 8
MODES = ("none", "static", "dynamic", "continuous", "separated")
PHASE_ORDERS = ("alternating", "prefill_first", "decode_first")
POLICIES = ("fcfs", "sjf", "priority", "fair", "deadline", "longest-prefix-match")

FORMATIONS = ("greedy", "length_balanced", "priority", "hybrid", "throughput")
DEADLINE_CHECKS = ("past", "needed", "expected")
PAGE_RESERVATIONS = ("none", "max_tokens", "max_model_len")
PREEMPTION_MODES = ("recompute", "swap", "auto")
VICTIMS = ("policy", "lowest_priority", "most_pages", "least_progress", "cheapest")


@dataclasses.dataclass(frozen=True)
class BatchingConfig:
    """Configures individual batching modes.

    batch_size: requests of a static or dynamic batch. max_wait_seconds: how long the first of them waits for the
    others at most. length_bucket: tokens; a dynamic batch holds prompts of one multiple of it.
    phase_order: which phase goes first when a separated iteration could do either. max_prefill_seqs, max_decode_seqs:
    sequences of a separated iteration at most.
    """

    batch_size: int = 32
    max_wait_seconds: float = 0.05
    length_bucket: int = 128
    phase_order: str = "prefill_first"
    max_prefill_seqs: int = 32
    max_decode_seqs: int = 256

    def __post_init__(self) -> None:
        for name in ("batch_size", "length_bucket", "max_prefill_seqs", "max_decode_seqs"):
            at_least(name, getattr(self, name), 1)
        between("max_wait_seconds", self.max_wait_seconds, 0.0)
        one_of("phase_order", self.phase_order, PHASE_ORDERS)


@dataclasses.dataclass(frozen=True)
class AdmissionConfig:
    """Configures what a step may admit.

    watermark: share of all pages that admission leaves free while others run, so that they can grow.
    page_reservation: pages taken at admission: "none" is those of the tokens computed, "max_tokens" those of prompt and
    max_tokens, "max_model_len" those of the longest sequence.
    prefill_share: prefill tokens of a step that also decodes, as a share of max_num_batched_tokens. A prompt that may
    not be split is taken whole, alone with the decodes, where it is longer.
    fill_buckets: prefill tokens take what much padding would take of a bucket. Where prefill_share would pad more than
    a fifth, the step ends with the bucket below, if that leaves prompts half of their share; else with the next.
    scheduler_delay_factor: no prompt is admitted until the first waiting one has waited this many times the duration of
    the last step with a prefill; 0 never delays.
    chunked_prefill_min_tokens: prompts up to this many tokens are not split over steps; 0 splits any.
    length_tolerance: prompts differ from the first of a length-balanced batch by this share of its length at most.
    max_passed_over_seconds: the longest time for which a formation other than greedy may pass over the head of the
    queue.
    deadline_check: which waiting requests end because of their deadline, before anything is computed for them: "past"
    is those whose deadline has passed; "needed" also those that could not have the tokens they need in time (the first,
    min_tokens, or max_tokens where nothing ends them sooner) if every step took no longer than the fastest so far;
    "expected" also those that could not have their expected output at the present time of a step. Policy "deadline"
    always checks as "expected" does.
    wait_for_prefix: a request waits for a prefix that another is computing, where that is predicted to be faster than
    computing it too.
    """

    watermark: float = 0.0
    page_reservation: str = "none"
    prefill_share: float = 1.0
    fill_buckets: bool = True
    scheduler_delay_factor: float = 0.0
    chunked_prefill_min_tokens: int = 0
    length_tolerance: float = 0.2
    max_passed_over_seconds: float = 10.0
    deadline_check: str = "needed"
    wait_for_prefix: bool = True

    def __post_init__(self) -> None:
        one_of("deadline_check", self.deadline_check, DEADLINE_CHECKS)
        between("watermark", self.watermark, 0.0, 0.5)
        one_of("page_reservation", self.page_reservation, PAGE_RESERVATIONS)
        between("prefill_share", self.prefill_share, 0.01, 1.0)
        between("scheduler_delay_factor", self.scheduler_delay_factor, 0.0)
        at_least("chunked_prefill_min_tokens", self.chunked_prefill_min_tokens, 0)
        between("length_tolerance", self.length_tolerance, 0.0)
        between("max_passed_over_seconds", self.max_passed_over_seconds, 0.0)
        if not isinstance(self.wait_for_prefix, bool):
            raise ValueError(f"wait_for_prefix is {self.wait_for_prefix!r}; it must be True or False")


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Configures individual policies.

    sjf_ageing: expected output tokens that a second of waiting makes up for.
    priority_weight, priority_ageing, priority_length_weight: of a request's priority, of a second waited, and of an
    expected output token, in the score of policy "priority".
    tenant_weights: shares of service by tenant under "fair"; a tenant without one has 1.
    prompt_token_weight, output_token_weight: what a token of each kind counts as service.
    ttft_target, tpot_target: seconds to the first token and for each further one, which policy "deadline" aims at.
    prefix_match_seconds: by how much "longest-prefix-match" moves up a request whose whole prompt is cached; a part of
    it counts in proportion.
    drop_late: "deadline" ends a request that cannot meet the targets; otherwise it is served after those that can. A
    request whose own deadline is out of reach always ends.
    """

    sjf_ageing: float = 10.0
    priority_weight: float = 10.0
    priority_ageing: float = 0.1
    priority_length_weight: float = 1.0
    tenant_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prompt_token_weight: float = 1.0
    output_token_weight: float = 2.0
    ttft_target: float = 1.0
    tpot_target: float = 0.1
    prefix_match_seconds: float = 10.0
    drop_late: bool = False

    def __post_init__(self) -> None:
        for name in ("sjf_ageing", "priority_ageing"):
            between(name, getattr(self, name), 1e-6)  # without ageing nothing bounds starvation
        for name in ("priority_weight", "priority_length_weight"):
            between(name, getattr(self, name), 0.0)
        for name in (
            "prompt_token_weight",
            "output_token_weight",
            "ttft_target",
            "tpot_target",
            "prefix_match_seconds",
        ):
            between(name, getattr(self, name), 1e-6)
        for tenant, weight in self.tenant_weights.items():
            between(f"tenant_weights[{tenant!r}]", weight, 1e-6)


@dataclasses.dataclass(frozen=True)
class PreemptionConfig:
    """Configures when running sequences are preempted, which ones, and how.

    preemption_mode: "recompute" computes the tokens again later; "swap" copies the pages to host memory, while
    CacheConfig.swap_space has room; "auto" does what costs less.
    victim: "policy" is the sequence with the highest priority key; "lowest_priority", "most_pages", "least_progress"
    (output tokens) and "cheapest" (to bring back) go by that, then by priority key.
    preemption_boost, preemption_boost_limit: what a preemption adds to a request's priority, and in all at most.
    preempt_priority_gap: a waiting request, wherever in the queue, that exceeds a running one's priority by more takes
    its place; None never.
    preempt_length_ratio: a waiting request so many times shorter than the longest running one takes its place; None
    never. preempt_for_pages: a waiting request that only memory keeps out takes the pages of running ones with a higher
    priority key.
    max_preemptions: a sequence preempted so often loses its place to no waiting request any more, and counts as one
    without pages for "most_pages".
    recompute_seconds_per_token, swap_seconds_per_page: costs that "auto" and "cheapest" go by (a page: out and in);
    None takes those measured at start.
    """

    preemption_mode: str = "auto"
    victim: str = "policy"
    preemption_boost: int = 1
    preemption_boost_limit: int = 3
    preempt_priority_gap: int | None = 5
    preempt_length_ratio: float | None = None
    preempt_for_pages: bool = False
    max_preemptions: int = 3
    recompute_seconds_per_token: float | None = None
    swap_seconds_per_page: float | None = None

    def __post_init__(self) -> None:
        one_of("preemption_mode", self.preemption_mode, PREEMPTION_MODES)
        one_of("victim", self.victim, VICTIMS)
        for name in ("preemption_boost", "preemption_boost_limit", "max_preemptions"):
            at_least(name, getattr(self, name), 0)
        if self.preempt_priority_gap is not None:
            at_least("preempt_priority_gap", self.preempt_priority_gap, 0)
        if self.preempt_length_ratio is not None:
            between("preempt_length_ratio", self.preempt_length_ratio, 1.0)
        for name in ("recompute_seconds_per_token", "swap_seconds_per_page"):
            if getattr(self, name) is not None:
                between(name, getattr(self, name), 0.0)


@dataclasses.dataclass(frozen=True)
class PredictionConfig:
    """Configures the predictor of output lengths.

    prediction_quantile: quantile of the predicted distribution that is used as the expected length.
    prediction_window: number of finished requests that each of its statistics keeps.
    """

    prediction_quantile: float = 0.5
    prediction_window: int = 512

    def __post_init__(self) -> None:
        between("prediction_quantile", self.prediction_quantile, 0.01, 0.99)
        at_least("prediction_window", self.prediction_window, 8)


@dataclasses.dataclass(frozen=True)
class AdaptationConfig:
    """Configures limits that follow the load.

    adaptive_batch_size: running requests at most are target_batch_tokens over the moving average of prompt lengths,
    from min_batch_size to max_batch_size (and never above max_num_seqs). batch_size_smoothing: weight of a new prompt.
    load_profile: below load_low the step is small and prompts are whole, however long (latency), above load_high it is
    large and chunked (throughput), else between (balanced). Load is unfinished requests over max_num_seqs.
    load_hysteresis: how far the load must pass a bound before the profile changes.
    latency_tokens, balanced_tokens, throughput_tokens: tokens of a step under each, and never above
    max_num_batched_tokens. latency_prefill_share, balanced_prefill_share, throughput_prefill_share: prefill_share under
    each, and never above prefill_share.
    """

    adaptive_batch_size: bool = False
    target_batch_tokens: int = 8192
    batch_size_smoothing: float = 0.1
    min_batch_size: int = 8
    max_batch_size: int = 256
    load_profile: bool = False
    load_low: float = 0.3
    load_high: float = 0.7
    load_hysteresis: float = 0.05
    latency_tokens: int = 512
    balanced_tokens: int = 2048
    throughput_tokens: int = 4096
    latency_prefill_share: float = 0.19
    balanced_prefill_share: float = 0.5
    throughput_prefill_share: float = 0.7

    def __post_init__(self) -> None:
        for name in ("target_batch_tokens", "min_batch_size", "max_batch_size"):
            at_least(name, getattr(self, name), 1)
        for name in ("latency_tokens", "balanced_tokens", "throughput_tokens"):
            at_least(name, getattr(self, name), MIN_BUCKET)
        for name in ("latency_prefill_share", "balanced_prefill_share", "throughput_prefill_share"):
            between(name, getattr(self, name), 0.01, 1.0)
        between("batch_size_smoothing", self.batch_size_smoothing, 0.001, 1.0)
        between("load_hysteresis", self.load_hysteresis, 0.0, 0.5)
        between("load_low", self.load_low, 0.0)
        between("load_high", self.load_high, 0.0)
        if self.max_batch_size < self.min_batch_size:
            raise ValueError(
                f"max_batch_size is {self.max_batch_size}; it must be at least min_batch_size {self.min_batch_size}"
            )
        if self.load_high < self.load_low:
            raise ValueError(f"load_high is {self.load_high}; it must be at least load_low {self.load_low}")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Configures the limits and rules of scheduling.

    max_num_seqs: requests that run at once (and slots on the device).
    max_num_batched_tokens: tokens computed in one step, prefill chunks and decodes together.
    enable_chunked_prefill: long prompts are computed over several steps, mixed with decodes.
    long_prefill_token_threshold: the chunk size: tokens of a prompt in a step at most; 0 is no limit but the budget.
    mode: how batches change over time: "none" (one request at a time), "static", "dynamic", "continuous", "separated".
    formation: how a batch is chosen from the waiting queue. policy: order of the waiting queue.
    max_num_waiting: requests that may queue before new ones are refused.
    max_penalty_rows: requests with presence, frequency or repetition penalties that run at once; each takes 2 bytes and
    a bit of device memory for each token of the vocabulary. Further ones wait, and hold up no others.
    max_decode_gap: seconds that a running request waits for its next token at most because of other requests' prompts.
    Chunks and the number of prompts under way follow from the measured times of steps, and prompts are split that
    otherwise would not be; None is no bound.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    mode: str = "continuous"
    formation: str = "greedy"
    policy: str = "fcfs"
    max_num_waiting: int = 4096
    max_penalty_rows: int = 64
    max_decode_gap: float | None = None
    batching: BatchingConfig = BatchingConfig()
    admission: AdmissionConfig = AdmissionConfig()
    ordering: PolicyConfig = PolicyConfig()
    preemption: PreemptionConfig = PreemptionConfig()
    prediction: PredictionConfig = PredictionConfig()
    adaptation: AdaptationConfig = AdaptationConfig()

    def __post_init__(self) -> None:
        at_least("max_num_seqs", self.max_num_seqs, 1)
        at_least("max_num_batched_tokens", self.max_num_batched_tokens, MIN_BUCKET)
        at_least("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        at_least("max_num_waiting", self.max_num_waiting, 1)
        at_least("max_penalty_rows", self.max_penalty_rows, 1)
        one_of("mode", self.mode, MODES)
        one_of("formation", self.formation, FORMATIONS)
        one_of("policy", self.policy, POLICIES)
        if self.long_prefill_token_threshold and not self.enable_chunked_prefill:
            raise ValueError(
                f"long_prefill_token_threshold is {self.long_prefill_token_threshold}; it needs enable_chunked_prefill"
            )
        if self.max_decode_gap is not None:
            self._check_gap(self.max_decode_gap)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least max_num_seqs "
                f"{self.max_num_seqs}, so that every running request can decode in one step"
            )
        if self.mode == "dynamic" and self.formation != "greedy":
            raise ValueError(
                f"formation is {self.formation!r}; mode 'dynamic' groups by length itself and needs formation 'greedy'"
            )

    @property
    def num_penalty_rows(self) -> int:
        """Returns the number of penalty rows: no more than requests that can run."""
        return min(self.max_penalty_rows, self.max_num_seqs)

    def _check_gap(self, bound: float) -> None:
        between("max_decode_gap", bound, 1e-4)
        if not self.enable_chunked_prefill:
            raise ValueError(
                f"max_decode_gap is {bound:g}, but enable_chunked_prefill is False: a bound splits prompts; enable it, "
                "or leave max_decode_gap unset"
            )
        if self.mode in ("static", "dynamic"):
            raise ValueError(
                f"max_decode_gap is {bound:g}, but mode is {self.mode!r}, in which the whole batch waits for its "
                "longest prompt; choose mode 'continuous' or 'separated', or leave max_decode_gap unset"
            )
