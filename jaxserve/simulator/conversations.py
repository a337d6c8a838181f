"""Generates traces of sessions whose turns repeat all that was said before, seeded: agents and chats.

As text, on the command line: `agent:sessions=50,rate=0.2,seed=1` or `chat:sessions=500,pause=20`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxserve.config.checks import at_least, between, one_of
from jaxserve.simulator.prompt_content import FIRST_CONTENT_ID, Content, answer_content
from jaxserve.simulator.synthetic import drawn_names
from jaxserve.simulator.trace_options import parsed
from jaxserve.simulator.traces import ROOT, Trace, make_trace

TURN_COUNTS = ("fixed", "geometric")
_SHARED_ID = FIRST_CONTENT_ID


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """Configures `conversation_trace`; the defaults are those of agents that call tools.

    A turn's prompt is the prompt of the turn before, its answer, and something new: a user's words or a tool's output.

    Attributes:
        sessions: number of sessions.
        rate: sessions that begin in a second on average, a Poisson process.
        seed: of everything random.
        turns: of a session: so many each, or on average.
        turn_counts: "fixed", or "geometric": as many sessions end after each turn as after the one before it.
        shared: tokens with which every session begins: instructions and the descriptions of tools.
        first: further tokens of a session's first prompt, on average.
        later: new tokens of each later prompt, on average.
        output: tokens of an answer, on average.
        pause: seconds from an answer to the next turn, on average: a tool runs, or a user reads and writes.
        spread: standard deviation of the natural logarithm of lengths and pauses, which are log-normal.
        max_length: a session ends before a prompt with its answer is longer.
        max_tokens: as the clients set it; 0 leaves it to the rule of the simulation.
        tenants: "NAME:WEIGHT/NAME:WEIGHT/...": shares of the sessions.
        deadline: seconds after the arrival of a turn; 0 is none.
    """

    sessions: int = 50
    rate: float = 0.1
    seed: int = 0
    turns: int = 30
    turn_counts: str = "fixed"
    shared: int = 1200
    first: int = 1400
    later: int = 495
    output: int = 450
    pause: float = 5.0
    spread: float = 0.6
    max_length: int = 131072
    max_tokens: int = 0
    tenants: str = ""
    deadline: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sessions", "turns", "first", "later", "output", "max_length"):
            at_least(f"conversation {name}", getattr(self, name), 1)
        for name in ("seed", "shared", "max_tokens"):
            at_least(f"conversation {name}", getattr(self, name), 0)
        one_of("conversation turn_counts", self.turn_counts, TURN_COUNTS)
        between("conversation rate", self.rate, 1e-9)
        between("conversation pause", self.pause, 0.0)
        between("conversation spread", self.spread, 0.0, 4.0)
        between("conversation deadline", self.deadline, 0.0)


AGENT = ConversationConfig()
"""30 turns, prompts from 2,600 to about 30,000 tokens; from 71 to 97 % of a prompt are that of the turn before."""

CHAT = ConversationConfig(
    sessions=500,
    rate=1.0,
    turns=6,
    turn_counts="geometric",
    shared=300,
    first=80,
    later=80,
    output=220,
    pause=30.0,
    spread=0.8,
)
"""Questions and answers about as long as those between people and assistants, with time to read and write."""

CONVERSATIONS = {"agent": AGENT, "chat": CHAT}
"""Kinds of conversation by name."""


def parse_conversation(kind: str, text: str) -> ConversationConfig:
    """Parses the settings of a kind of conversation, "NAME=VALUE,NAME=VALUE". Raises ValueError as `parsed` does."""
    return parsed(kind, CONVERSATIONS[kind], text)


def conversation_trace(config: ConversationConfig, name: str = "conversations") -> Trace:
    """Generates the trace that the configuration describes, deterministically.

    Beginnings, numbers of turns, lengths and pauses are drawn from separate streams: another rate leaves the rest
    unchanged.
    """
    starts, turns, news, outputs, pauses, tenants = (
        np.random.default_rng([config.seed, stream]) for stream in range(6)
    )
    begins = np.cumsum(starts.exponential(1 / config.rate, config.sessions)).tolist()
    names = drawn_names("tenants", config.tenants, config.sessions, tenants) or [""] * config.sessions
    counts = (
        turns.geometric(1 / config.turns, config.sessions)
        if config.turn_counts == "geometric"
        else np.full(config.sessions, config.turns)
    )
    rows = _Rows(config)
    for begin, tenant, count in zip(begins, names, counts.tolist(), strict=True):
        new = _log_normal(news, config.later, config.spread, count)
        new[0] = _log_normal(news, config.first, config.spread, 1)[0]
        waits = config.pause * _unit(pauses, config.spread, count)
        rows.add_session(begin, tenant, new, _log_normal(outputs, config.output, config.spread, count), waits)
    return rows.trace(name)


class _Rows:
    """Collects the turns of sessions, one session after another."""

    def __init__(self, config: ConversationConfig):
        self._config = config
        self._arrivals: list[float] = []
        self._prompts: list[Content] = []
        self._outputs: list[int] = []
        self._answers: list[int] = []
        self._tenants: list[str] = []
        self._parents: list[int] = []
        self._pauses: list[float] = []
        self._next_id = _SHARED_ID + 1

    def add_session(self, begin: float, tenant: str, new: np.ndarray, outputs: np.ndarray, pauses: np.ndarray) -> None:
        """Adds a session; new, outputs (tokens) and pauses (seconds before each turn but the first): one a turn."""
        said, arrival, parent = Content.of([(_SHARED_ID, self._config.shared)]), begin, ROOT
        for tokens, output, pause in zip(new.tolist(), outputs.tolist(), pauses.tolist(), strict=True):
            prompt = said + Content((self._next_id,), (tokens,))
            if len(prompt) + output > self._config.max_length:
                return
            if parent != ROOT:
                arrival += pause
            self._arrivals.append(arrival)
            self._prompts.append(prompt)
            self._outputs.append(output)
            self._answers.append(self._next_id + 1)
            self._tenants.append(tenant)
            self._parents.append(parent)
            self._pauses.append(0.0 if parent == ROOT else pause)
            said = prompt + answer_content(self._next_id + 1, output)
            parent = len(self._arrivals) - 1
            self._next_id += 2

    def trace(self, name: str) -> Trace:
        if not self._arrivals:
            raise ValueError(
                f"conversation max_length is {self._config.max_length}; no first prompt and answer fit: raise it"
            )
        return make_trace(
            name,
            self._arrivals,
            [len(prompt) for prompt in self._prompts],
            self._outputs,
            max_tokens=self._config.max_tokens,
            tenants=self._tenants,
            deadlines=self._config.deadline or np.inf,
            prompts=self._prompts,
            answers=self._answers,
            parents=self._parents,
            pauses=self._pauses,
        )


def _log_normal(rng: np.random.Generator, mean: float, spread: float, count: int) -> np.ndarray:
    """Draws whole numbers, at least 1."""
    return np.maximum(np.rint(mean * _unit(rng, spread, count)), 1).astype(np.int64)


def _unit(rng: np.random.Generator, spread: float, count: int) -> np.ndarray:
    """Draws log-normal numbers of mean 1."""
    return rng.lognormal(-(spread**2) / 2, spread, count)
