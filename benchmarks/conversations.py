"""Random conversations of several turns for engines that share prefixes, and what each way to serve them must agree on.

A conversation begins with one of a few system prompts; the prompt of a turn is that of the turn before, its answer and
a new text. Beside some turns there are others with the same history: a branch, an embedding, or a twin of the turn that
is aborted after a few steps. Everything but the answers is drawn beforehand, so that every engine gets the same.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxserve.engine.channel import EngineClient
from jaxserve.engine.messages import AbortRequest
from jaxserve.frontend.frontend import FrontEnd, Prepared
from jaxserve.frontend.offline import FinishedRequest, run_all
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.pooling_params import PoolingParams
from jaxserve.request import RequestOptions
from jaxserve.sampling_params import SamplingParams

MOST_TURNS = 4
SYSTEM_PROMPTS = 6
SYSTEM_TOKENS = (16, 120)
TENANTS = ("", "a", "b")
SALTS = ("", "", "salt")
LONG_ANSWER = 64
BRANCH, EMBEDDING, ABORT, OPT_OUT, LONG = 0.12, 0.1, 0.1, 0.05, 0.4
"""Shares of turns: that have a branch, an embedding or an aborted twin beside them; that do not use the cache; whose
answers may have LONG_ANSWER tokens."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One request. after: the turn whose prompt and answer stand in front of `text`; None for the first. abort_after:
    steps after which it is aborted; it is then the twin of the turn that `twin` names."""

    name: str
    after: str | None
    text: tuple[int, ...]
    params: SamplingParams | PoolingParams
    options: RequestOptions
    abort_after: int | None = None
    twin: str | None = None

    @property
    def kind(self) -> str:
        """Returns "generated", or the pooling of an embedding."""
        return "generated" if isinstance(self.params, SamplingParams) else f"embedded, {self.params.pooling_type}"


def draw_turns(count: int, texts: Sequence[tuple[int, ...]], params: Sequence[SamplingParams], seed: int) -> list[Turn]:
    """Draws so many conversations; a turn stands behind the one that it comes after."""
    rng = random.Random(seed)
    systems = [_system_prompt(texts, rng) for _ in range(SYSTEM_PROMPTS)]
    turns: list[Turn] = []
    for number in range(count):
        tenant, salt = rng.choice(TENANTS), rng.choice(SALTS)
        last, begin = None, rng.choice(systems)
        for index in range(rng.randint(2, MOST_TURNS)):
            options = RequestOptions(tenant, cache_salt=salt, prefix_caching=rng.random() >= OPT_OUT)
            drawn = dataclasses.replace(rng.choice(params), seed=rng.randrange(2**63))
            if rng.random() < LONG:
                drawn = dataclasses.replace(drawn, max_tokens=LONG_ANSWER, ignore_eos=True)
            turn = Turn(f"{number}.{index}", last, begin + rng.choice(texts), drawn, options)
            turns.append(turn)
            if rng.random() < BRANCH:
                other = dataclasses.replace(rng.choice(params), seed=rng.randrange(2**63))
                text = begin + rng.choice(texts)
                turns.append(dataclasses.replace(turn, name=f"{turn.name}, branch", text=text, params=other))
            if rng.random() < EMBEDDING:
                pooled = PoolingParams(pooling_type=rng.choice(("LAST", "MEAN", "CLS")), normalize=rng.random() < 0.5)
                turns.append(dataclasses.replace(turn, name=f"{turn.name}, embedded", params=pooled))
            if rng.random() < ABORT and drawn.n == 1:
                name, after = f"{turn.name}, aborted", rng.randint(1, 40)
                turns.append(dataclasses.replace(turn, name=name, abort_after=after, twin=turn.name))
            last, begin = turn.name, ()
    return turns


def _system_prompt(texts: Sequence[tuple[int, ...]], rng: random.Random) -> tuple[int, ...]:
    wanted, found = rng.randint(*SYSTEM_TOKENS), ()
    while len(found) < wanted:
        found += rng.choice(texts)
    return found[:wanted]


def most_tokens(turns: Sequence[Turn]) -> int:
    """Returns the tokens that a request has at most, its answer included."""
    lengths: dict[str | None, int] = {None: 0}
    for turn in turns:
        lengths[turn.name] = lengths[turn.after] + len(turn.text) + (turn.params.max_tokens or 0)
    return max(lengths.values())


class Conversations:
    """Serves turns by one engine, each once the one that it comes after has ended.

    finished: by name. prompts: token ids of each turn, before any of them is cut off.
    """

    def __init__(self, front_end: FrontEnd, client: EngineClient, turns: Sequence[Turn], seed: int):
        self._front_end, self._client = front_end, client
        self._rng = random.Random(seed)
        self._turns = {turn.name: turn for turn in turns}
        self._following: dict[str | None, list[Turn]] = defaultdict(list)
        for turn in turns:
            self._following[turn.after].append(turn)
        self._ready = deque(self._following.pop(None))
        self._to_start = len(turns)
        self._aborts: dict[str, int] = {}
        self._histories: dict[str | None, tuple[int, ...]] = {None: ()}
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.finished: dict[str, FinishedRequest] = {}

    def run(self) -> None:
        """Serves all turns."""
        for found in run_all(self._front_end, self._client, self._requests(), self._stepped):
            self._take(found)

    def _requests(self) -> Iterator[Prepared | None]:
        while self._to_start:
            if not self._ready:
                yield None
                continue
            turn = self._ready.popleft()
            self._to_start -= 1
            prompt = self.prompts[turn.name] = self._histories[turn.after] + turn.text
            if turn.abort_after is not None:
                self._aborts[turn.name] = turn.abort_after
            yield self._front_end.prepare(prompt, turn.params, turn.options, request_id=turn.name)

    def _stepped(self, _: int) -> None:
        for name in list(self._aborts):
            self._aborts[name] -= 1
            if not self._aborts[name]:
                del self._aborts[name]
                self._client.send(AbortRequest(name))

    def _take(self, found: FinishedRequest) -> None:
        name = found.request_id
        self._aborts.pop(name, None)
        self.finished[name] = found
        following = self._following.pop(name, None)
        if following is None:
            return
        answer = found.samples[len(self.prompts[name]) % len(found.samples)].token_ids
        self._histories[name] = self.prompts[name] + answer
        if self._rng.random() < 0.8:  # as those who talk do; of the others the pages may be gone
            self._ready.extendleft(reversed(following))
        else:
            self._ready.extend(following)


def answer_text(found: FinishedRequest) -> str:
    """Returns what must be equal, as JSON in the form that `option_identity.differences` takes: positions of [id,
    value, rank]. Numbers of an embedding are such values."""
    prompt: list[Any] | None = None
    if found.embedding:
        values = np.frombuffer(found.embedding, "<f4").tolist()
        prompt = [[[index, value, 0]] for index, value in enumerate(values)]
    elif (scored := found.prompt_logprobs) is not None:
        prompt = _positions(scored.columns, scored.token_ids[scored.start :])
    samples = [
        {
            "token_ids": one.token_ids,
            "text": one.text,
            "reason": one.finish_reason.value,
            "logprobs": None if one.logprobs is None else _positions(one.logprobs, one.token_ids),
        }
        for one in found.samples
    ]
    return json.dumps({"error": found.error, "prompt": prompt, "samples": samples})


def _positions(columns: LogprobColumns, token_ids: Sequence[int]) -> list[list[list[Any]]]:
    found = []
    for place, (token_id, value, rank) in enumerate(
        zip(token_ids, columns.values.tolist(), columns.ranks.tolist(), strict=True)
    ):
        top = zip(columns.top_ids[place].tolist(), columns.top_values[place].tolist(), strict=True)
        found.append([[token_id, value, rank], *([one, likely, 0] for one, likely in top)])
    return found


def unexplained_hits(turns: Sequence[Turn], finished: Callable[[str], FinishedRequest], page_size: int) -> list[str]:
    """Returns the turns that found pages which nobody of their tenant and salt can have filled, or part of a page, or
    all of a prompt, or although they do not use the cache."""
    filled: dict[tuple[str, str], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for turn in turns:
        if turn.options.prefix_caching:
            one, of_tenant = finished(turn.name), filled[turn.options.tenant, turn.options.cache_salt]
            for sample in one.samples:
                for key in _prefixes(one.prompt_token_ids + sample.token_ids, page_size):
                    of_tenant[key].add(turn.name)
    wrong = []
    for turn in turns:
        one = finished(turn.name)
        pages, rest = divmod(one.num_cached_tokens, page_size)
        if not one.num_cached_tokens:
            continue
        keys = _prefixes(one.prompt_token_ids[:-1], page_size)
        whose = filled[turn.options.tenant, turn.options.cache_salt]
        others = len(one.samples) > 1  # a sample that begins late finds what another one of its request has computed
        explained = not rest and pages <= len(keys) and (others or len(whose[keys[pages - 1]]) > 1)
        if not explained or not turn.options.prefix_caching:
            wrong.append(turn.name)
    return wrong


def _prefixes(token_ids: Sequence[int], page_size: int) -> list[int]:
    """Returns a hash of each beginning of full pages."""
    found, last = [], 0
    for begin in range(0, len(token_ids) - page_size + 1, page_size):
        last = hash((last, *token_ids[begin : begin + page_size]))
        found.append(last)
    return found
