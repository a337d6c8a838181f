"""Decides which requests are let in: the bounds of the waiting room, of each tenant, and of what can be in time.

Everything here is arithmetic on a time that the caller passes: no clock, no input or output. A request counts as
waiting from `accept` until its first output, and as unfinished until its end. Checks cost O(tenants that have requests
or were refused lately), whatever the number of requests. A request of several samples takes a place for each of them.

Places and waiting tokens are divided by `shares`. A tenant's share of the places is its weight over the mean service of
its requests, times their mean stay (Little's law), corrected by how its service of late compares with its weight
(`Fairness`): service is then as the weights are, under a policy that goes by arrival too.
"""

from __future__ import annotations

import collections
import dataclasses

from jaxserve.config.queue_limits import QueueConfig
from jaxserve.config.shown import shown
from jaxserve.frontend.delta import DeadlineError, QueueFullError
from jaxserve.frontend.rates import Average, RateMeter
from jaxserve.frontend.shares import Claim, may_take, share
from jaxserve.frontend.tenant_service import Fairness, Tenant
from jaxserve.request import COMPLETED, FinishReason

UNKNOWN_RETRY_SECONDS = 1.0
"""Seconds after which to try again while no rate of service is known."""

UNKNOWN_OUTPUT = 1024
"""Output tokens that a request without max_tokens counts with while none has ended."""

_QUARTER = 4.0
"""A refused client is told to come back when about this part of the queue has been served."""


_MORE_CAUTION, _LESS_CAUTION, _MOST_CAUTION = 1.1, 0.998, 3.0
"""What a missed and a met deadline do to the factor over predicted times. Where the two balance, one in fifty is
missed; while the load changes, more are."""

_RETURNS_PER_PLACE = 1.5
"""Refused clients that are told to come back for each place that becomes free."""

_LEAST_SECONDS = 1e-6
_REFUSALS_FADE_SECONDS = 1.0
_MANY_REFUSALS = 50.0
"""Refusals a second from which they are answered late."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """Describes what the admission must know of the engine.

    max_num_seqs: requests that run. max_open: unfinished requests. in_order: whether a tenant's requests start in order
    of arrival, so that their wait can be predicted. prompt_weight, output_weight: what a token counts as service.
    """

    max_num_seqs: int
    max_open: int
    in_order: bool = True
    prompt_weight: float = 1.0
    output_weight: float = 2.0


@dataclasses.dataclass(eq=False)
class Ticket:
    """Stands for one accepted request. max_tokens: of each sample. started: the time of its first output, or None while
    it waits."""

    tenant: Tenant
    prompt_tokens: int
    max_tokens: int
    accepted: float
    deadline: float | None = None
    samples: int = 1
    started: float | None = None

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.samples * self.max_tokens


class Admission:
    """Tracks unfinished requests by tenant and says which further ones may come.

    Every `now` is of one clock, which deadlines are compared with, and may stand still.
    """

    def __init__(self, config: QueueConfig, engine: Engine):
        self._config = config
        self._engine = engine
        self._tenants: dict[str, Tenant] = {}
        self._active: dict[Tenant, None] = {}  # those with requests or refused lately
        self._others: Tenant | None = None  # all tenants beyond max_tenants
        self.num_open = self.num_waiting = self.waiting_tokens = 0
        self._starts, self._started_tokens, self._ends = RateMeter(), RateMeter(), RateMeter()
        self._fairness = Fairness(engine.max_open)
        self._service = Average()
        self.output, self.most_output = Average(), Average()
        self._wait, self.run = Average(), Average()
        self._caution = 1.0
        self._refusals = RateMeter(_REFUSALS_FADE_SECONDS)
        self._seconds_per_token = Average()
        self._seen: float | None = None
        self.rejections: collections.Counter[str] = collections.Counter()

    @property
    def max_waiting_tokens(self) -> int:
        return self._config.max_waiting_tokens

    @property
    def _is_backlogged(self) -> bool:
        """Whether more requests are unfinished than can run: only then do starts tell how fast a queue moves."""
        return self.num_open > self._engine.max_num_seqs

    @property
    def finished_per_second(self) -> float | None:
        """Rate at which requests end while there are any; None while it is unknown."""
        return self._ends.rate

    # ---- what may come -------------------------------------------------------------------------------------------

    def check(
        self,
        name: str,
        prompt_tokens: int,
        max_tokens: int | None,
        now: float,
        *,
        deadline: float | None = None,
        ending: int = 0,
        samples: int = 1,
    ) -> None:
        """Raises where `accept` must not be called. Called before a prompt is tokenized, with the least tokens it has.

        Args:
            name: the tenant.
            prompt_tokens: tokens of the prompt.
            max_tokens: output tokens that a sample of the request may take; None where it does not say.
            now: the present time.
            deadline: of the request.
            ending: samples that have ended here and that the engine has yet to release.
            samples: that the request has.

        Raises:
            QueueFullError: it may come later; the error says when.
            DeadlineError: it would be too late, as predicted.
        """
        self._pass(now)
        tenant = self._tenant(name, now)
        max_tokens = self._reserved(tenant, max_tokens)
        tokens = prompt_tokens + samples * max_tokens
        self._check_tenant(tenant, tokens, samples, now)
        self._check_places(tenant, ending, samples, now)
        self._check_tokens(tenant, tokens, now)
        self._check_wait(tenant, max_tokens, deadline, now)

    @property
    def seconds_to_refuse(self) -> float:
        """Seconds after which a refusal should be answered."""
        return self._config.refusal_seconds if (self._refusals.rate or 0.0) > _MANY_REFUSALS else 0.0

    def accept(
        self,
        name: str,
        prompt_tokens: int,
        max_tokens: int | None,
        now: float,
        *,
        deadline: float | None = None,
        samples: int = 1,
    ) -> Ticket:
        """Counts a request that was checked; returns what `started` and `ended` take."""
        self._pass(now)
        tenant = self._tenant(name, now)
        ticket = Ticket(tenant, prompt_tokens, self._reserved(tenant, max_tokens), now, deadline, samples)
        self._joins(tenant)
        tenant.refused_until = now
        tenant.tokens.add(ticket.tokens)
        for counts in (self, tenant):
            counts.num_open += samples
            counts.num_waiting += samples
            counts.waiting_tokens += ticket.tokens
        if tenant.request_allowance is not None:
            tenant.request_allowance.take(1, now)
        if tenant.token_allowance is not None:
            tenant.token_allowance.take(ticket.tokens, now)
        return ticket

    def started(self, ticket: Ticket, now: float) -> None:
        """Records a request's first output."""
        self._pass(now)
        ticket.started = now
        self._leaves_queue(ticket)
        self._wait.add(max(now - ticket.accepted, 0.0))
        if self._is_backlogged:
            self._starts.happened(ticket.samples)
            self._started_tokens.happened(ticket.tokens)
            ticket.tenant.starts.happened(ticket.samples)

    def ended(self, ticket: Ticket, output_tokens: int, now: float, reason: FinishReason = FinishReason.STOP) -> None:
        """Records the end of a request, for whatever reason. output_tokens: that were computed for all its samples."""
        self._pass(now)
        tenant = ticket.tenant
        if ticket.started is None:
            self._leaves_queue(ticket)
        else:
            self._learn(ticket, output_tokens, now, reason)
        if ticket.deadline is not None:
            factor = _MORE_CAUTION if reason is FinishReason.DEADLINE else _LESS_CAUTION
            self._caution = min(max(self._caution * factor, 1.0), _MOST_CAUTION)
        self._ends.happened(ticket.samples)
        for counts in (self, tenant):
            counts.num_open -= ticket.samples
        if tenant.token_allowance is not None:
            used = output_tokens + (ticket.prompt_tokens if ticket.started is not None else 0)
            tenant.token_allowance.take(used - ticket.tokens, now)

    def _reserved(self, tenant: Tenant, max_tokens: int | None) -> int:
        """Returns the output tokens that a request counts with: its limit, or else what the tenant's usually have."""
        if max_tokens is not None:
            return max_tokens
        usual = tenant.output.value or self.output.value
        return UNKNOWN_OUTPUT if usual is None else max(round(usual), 1)

    def _leaves_queue(self, ticket: Ticket) -> None:
        for counts in (self, ticket.tenant):
            counts.num_waiting -= ticket.samples
            counts.waiting_tokens -= ticket.tokens

    def _learn(self, ticket: Ticket, output_tokens: int, now: float, reason: FinishReason) -> None:
        engine, tenant = self._engine, ticket.tenant
        service = engine.prompt_weight * ticket.prompt_tokens + engine.output_weight * output_tokens
        for known in (self._service, tenant.service):
            known.add(service / ticket.samples)
        self._fairness.add(tenant, service, self._tenants.values())
        assert ticket.started is not None
        seconds = max(now - ticket.started, 0.0)
        output_tokens = output_tokens // ticket.samples  # of one
        if output_tokens > 1:
            self._seconds_per_token.add(seconds / (output_tokens - 1))
        for known in (self, tenant):
            known.run.add(seconds)
            if reason.value in COMPLETED:
                known.output.add(output_tokens)
                known.most_output.add(ticket.max_tokens)

    # ---- checks --------------------------------------------------------------------------------------------------

    def _check_tenant(self, tenant: Tenant, tokens: int, samples: int, now: float) -> None:
        """Checks the tenant's own limits."""
        config, who = tenant.config, f"tenant {shown(tenant.name)}"
        if config.max_requests is not None and samples > config.max_requests:
            raise ValueError(
                f"n is {samples}; {who} may have {config.max_requests} unfinished samples (max_requests): lower it"
            )
        if config.max_requests is not None and tenant.num_open + samples > config.max_requests:
            raise self._refusal(
                "tenant_requests",
                f"{who} has {tenant.num_open} unfinished requests; at most {config.max_requests} (max_requests) are "
                "allowed: wait for one to end",
                self._until_ended(1, tenant),
            )
        if config.max_waiting_requests is not None and tenant.num_waiting >= config.max_waiting_requests:
            raise self._refusal(
                "tenant_waiting_requests",
                f"{who} has {tenant.num_waiting} waiting requests; at most {config.max_waiting_requests} "
                "(max_waiting_requests) are allowed: try again later",
                self._until_started(tenant),
            )
        most = config.max_waiting_tokens
        if most is not None and tenant.waiting_tokens and tenant.waiting_tokens + tokens > most:
            raise self._refusal(
                "tenant_waiting_tokens",
                f"{who} has {tenant.waiting_tokens} waiting tokens of prompts and max_tokens; with {tokens} of this "
                f"request they would exceed max_waiting_tokens {most}: try again later or lower max_tokens",
                self._until_started(tenant),
            )
        for allowance, amount, field, limit in (
            (tenant.request_allowance, 1, "requests_per_minute", config.requests_per_minute),
            (tenant.token_allowance, tokens, "tokens_per_minute", config.tokens_per_minute),
        ):
            if allowance is not None and (seconds := allowance.seconds_until(amount, now)) > 0:
                words = "its next request" if amount == 1 else f"the {amount} tokens of this request"
                raise self._refusal(
                    f"tenant_{field}",
                    f"{who} is over its {field} of {limit:g}: {words} may come in {seconds:.1f} s",
                    seconds,
                )

    def _check_places(self, tenant: Tenant, ending: int, samples: int, now: float) -> None:
        """Checks the number of unfinished samples, and the tenant's share of it."""
        capacity, used = self._engine.max_open, self.num_open + ending
        corrections = self._fairness.corrections({**self._active, tenant: None}, now)
        own = self._place_claim(tenant, corrections[tenant], now)
        others = [self._place_claim(each, corrections[each], now) for each in self._active if each is not tenant]
        if may_take(samples, own, others, capacity, used):
            return
        seconds = self._until_ended(max(1.0, (used - self._engine.max_num_seqs) / _QUARTER), None)
        self._wants(tenant, seconds, now)
        seconds = self._turn(tenant, seconds, now)
        if used + samples > capacity:
            raise self._refusal(
                "queue_requests",
                f"{used} requests are unfinished; at most {capacity} (max_num_seqs + max_num_waiting) are allowed: try "
                "again later",
                seconds,
            )
        total = own.weight + sum(other.weight for other in others)
        raise self._refusal(
            "tenant_share",
            f"tenant {shown(tenant.name)} has {tenant.num_open} unfinished requests; its share of {capacity} "
            f"(max_num_seqs + max_num_waiting) is {share(own.weight, total, capacity):.0f}, and others want theirs: "
            "try again later",
            seconds,
        )

    def _check_tokens(self, tenant: Tenant, tokens: int, now: float) -> None:
        """Checks the waiting tokens, and the tenant's share of them."""
        capacity, used = self._config.max_waiting_tokens, self.waiting_tokens
        if not used:
            return
        own = self._token_claim(tenant, now)
        others = [self._token_claim(each, now) for each in self._active if each is not tenant]
        if may_take(tokens, own, others, capacity, used):
            return
        lacking = max(used + tokens - capacity, used / _QUARTER)
        rate = self._started_tokens.rate
        seconds = lacking / rate if rate else UNKNOWN_RETRY_SECONDS
        self._wants(tenant, seconds, now)
        seconds = self._turn(tenant, seconds, now)
        raise self._refusal(
            "queue_tokens" if used + tokens > capacity else "tenant_share",
            f"{used} tokens of prompts and max_tokens wait, {tenant.waiting_tokens} of them tenant "
            f"{shown(tenant.name)}'s; with {tokens} of this request they would exceed max_waiting_tokens {capacity}, "
            "or the tenant's share of it: try again later or lower max_tokens",
            seconds,
        )

    def _check_wait(self, tenant: Tenant, max_tokens: int, deadline: float | None, now: float) -> None:
        """Checks the predicted wait, while there is a queue."""
        if not self._engine.in_order or not self._is_backlogged:
            return
        wait = self._predicted_wait(tenant)
        if wait is None:
            return
        most = self._config.max_waiting_seconds
        if most is not None and wait > most:
            seconds = max(wait - most, wait / _QUARTER)
            self._wants(tenant, seconds, now)
            seconds = self._turn(tenant, seconds, now)
            raise self._refusal(
                "queue_seconds",
                f"a request would wait {wait:.2f} s for its first token; at most {most:g} s (max_waiting_seconds) are "
                "allowed: try again later",
                seconds,
            )
        if deadline is None or not self._config.drop_unreachable:
            return
        known = tenant if tenant.output.value else self
        output = max_tokens * min((known.output.value or 0.0) / (known.most_output.value or 1.0), 1.0)
        run = (self._seconds_per_token.value or 0.0) * output
        if now + self._caution * (wait + run) > deadline:
            self.rejections["deadline"] += 1
            raise DeadlineError(
                f"deadline is in {deadline - now:.3f} s and cannot be met: {self.num_waiting} requests wait, which "
                f"takes about {wait:.3f} s, and {output:.0f} output tokens take about {run:.3f} s: allow more time "
                "or try again later"
            )

    # ---- predictions ---------------------------------------------------------------------------------------------

    def _predicted_wait(self, tenant: Tenant) -> float | None:
        """Returns the seconds until a request of the tenant that came now would start; None while no rate is known.

        The shorter of two predictions: by all requests that wait, and by the tenant's own.
        """
        pairs = ((self.num_waiting, self._starts.rate), (tenant.num_waiting, tenant.starts.rate))
        return min((waiting / rate for waiting, rate in pairs if rate), default=None)

    def _until_ended(self, count: float, tenant: Tenant | None) -> float:
        """Returns the seconds in which so many requests end, of one tenant or of all."""
        rate = self._ends.rate
        if not rate:
            return UNKNOWN_RETRY_SECONDS
        part = 1.0 if tenant is None else tenant.num_open / max(self.num_open, 1)
        return count / (rate * part)

    def _until_started(self, tenant: Tenant) -> float:
        """Returns the seconds in which a quarter of the tenant's waiting requests start, and at least one."""
        rate = tenant.starts.rate or self._starts.rate
        return max(1.0, tenant.num_waiting / _QUARTER) / rate if rate else UNKNOWN_RETRY_SECONDS

    def _turn(self, tenant: Tenant, seconds: float, now: float) -> float:
        """Returns the seconds after which a client should come back: at least `seconds`, and behind those of its tenant
        that were refused before it.

        If all came back when the queue has moved, most of them would be refused again, which costs a busy server more
        than it has. So of each tenant only somewhat more come back than it can have places, whatever their number.
        """
        rate = self._ends.rate
        if not rate:
            return seconds
        weights = sum(each.config.weight for each in self._active)  # the tenant is one of them by now
        apart = weights / tenant.config.weight / (_RETURNS_PER_PLACE * rate)
        turn = max(tenant.next_return + apart, now + seconds)
        tenant.next_return = min(turn, now + self._config.max_retry_seconds)
        return tenant.next_return - now

    def _refusal(self, reason: str, text: str, seconds: float) -> QueueFullError:
        self.rejections[reason] += 1
        self._refusals.happened()
        config = self._config
        seconds = min(max(seconds, config.min_retry_seconds), config.max_retry_seconds)
        return QueueFullError(text, retry_seconds=seconds)

    # ---- tenants -------------------------------------------------------------------------------------------------

    def _wants(self, tenant: Tenant, seconds: float, now: float) -> None:
        """Keeps the tenant's share for it until its clients have had the time to come back."""
        seconds = min(max(seconds, self._config.min_retry_seconds), self._config.max_retry_seconds)
        tenant.refused_until = tenant.wants_until = max(tenant.wants_until, now + 2 * seconds + 1)
        self._joins(tenant)

    def _joins(self, tenant: Tenant) -> None:
        """Counts a tenant among those that have or want something."""
        if tenant not in self._active:
            self._fairness.lift(tenant, self._active)
            self._active[tenant] = None

    def _place_claim(self, tenant: Tenant, correction: float, now: float) -> Claim:
        service = tenant.service.value or self._service.value or 1.0
        run = self.run.value if tenant.run.value is None else tenant.run.value
        seconds = (self._wait.value or 0.0) + (run or 0.0) + _LEAST_SECONDS
        return Claim(correction * tenant.config.weight / service * seconds, tenant.num_open, now < tenant.refused_until)

    def _token_claim(self, tenant: Tenant, now: float) -> Claim:
        unit = tenant.tokens.value or 1.0
        return Claim(tenant.config.weight, tenant.waiting_tokens, now < tenant.refused_until, unit)

    def _tenant(self, name: str, now: float) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is not None:
            return tenant
        if len(self._tenants) >= self._config.max_tenants:
            self._tenants = {known: each for known, each in self._tenants.items() if not each.is_idle(now)}
        if len(self._tenants) >= self._config.max_tenants and name not in self._config.tenants:
            self._others = self._others or Tenant("(others)", self._config.default_tenant, now)
            return self._others
        tenant = self._tenants[name] = Tenant(name, self._config.tenant(name), now)
        return tenant

    def _pass(self, now: float) -> None:
        """Counts the time since the last call for the rates, and forgets tenants that want nothing any more."""
        if self._seen is not None and now > self._seen:
            seconds = now - self._seen
            self._refusals.passed(seconds)
            if self.num_open:
                self._ends.passed(seconds)
            if self._is_backlogged:
                self._starts.passed(seconds)
                self._started_tokens.passed(seconds)
                for tenant in self._active:
                    if tenant.num_waiting:
                        tenant.starts.passed(seconds)
            if any(not each.num_open and now >= each.wants_until for each in self._active):
                self._active = {each: None for each in self._active if each.num_open or now < each.wants_until}
        self._seen = now if self._seen is None else max(now, self._seen)
