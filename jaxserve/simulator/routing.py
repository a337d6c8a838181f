"""Which replica of a fleet a request goes to."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.config.scheduling import PredictionConfig
from jaxserve.request import EngineRequest
from jaxserve.scheduler.length_prediction import OutputLengthPredictor


class Router:
    """Chooses among the replicas that take requests, and keeps what each has under way."""

    def __init__(self) -> None:
        self._placed: dict[int, tuple[int, float, EngineRequest]] = {}
        self._load: dict[int, float] = {}

    def choose(self, request: EngineRequest, replicas: Sequence[int]) -> int:
        """The number of one of the replicas."""
        raise NotImplementedError

    def work(self, request: EngineRequest) -> float:
        """What the request adds to its replica's load."""
        return 1.0

    def place(self, request: EngineRequest, replicas: Sequence[int]) -> int:
        """Chooses and takes note."""
        replica, work = self.choose(request, replicas), self.work(request)
        self._placed[int(request.request_id)] = replica, work, request
        self._load[replica] = self._load.get(replica, 0.0) + work
        return replica

    def ended(self, index: int, output_tokens: int) -> EngineRequest:
        """A request has ended."""
        replica, work, request = self._placed.pop(index)
        self._load[replica] -= work
        return request

    def load(self, replica: int) -> float:
        return self._load.get(replica, 0.0)


class RoundRobin(Router):
    """One after another."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0

    def choose(self, request: EngineRequest, replicas: Sequence[int]) -> int:
        self._turn += 1
        return replicas[(self._turn - 1) % len(replicas)]


class LeastLoaded(Router):
    """The fewest requests under way."""

    def choose(self, request: EngineRequest, replicas: Sequence[int]) -> int:
        return min(replicas, key=lambda replica: (self.load(replica), replica))


class PredictedWork(LeastLoaded):
    """The least work under way, in seconds of a device: prompts, and outputs as long as the router's own predictor
    expects from the requests that it has seen end.

    seconds_per_prompt_token, seconds_per_output_token: what a token costs where others share the step.
    """

    def __init__(self, seconds_per_prompt_token: float, seconds_per_output_token: float):
        super().__init__()
        self._seconds = seconds_per_prompt_token, seconds_per_output_token
        self._predictor = OutputLengthPredictor(PredictionConfig())

    def work(self, request: EngineRequest) -> float:
        prompt, output = self._seconds
        return prompt * len(request.prompt_token_ids) + output * self._predictor.expected(request)

    def ended(self, index: int, output_tokens: int) -> EngineRequest:
        request = super().ended(index, output_tokens)
        if output_tokens:
            self._predictor.observe(request, output_tokens)
        return request


ROUTINGS = ("round_robin", "least_loaded", "predicted_work")
