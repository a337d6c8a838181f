"""Routes requests to the replicas of a fleet."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.config.scheduling import PredictionConfig
from jaxserve.request import EngineRequest
from jaxserve.scheduler.length_prediction import OutputLengthPredictor


class Router:
    """Chooses among the replicas that accept requests, and tracks the load of each."""

    def __init__(self) -> None:
        self._placed: dict[int, tuple[int, float, EngineRequest]] = {}
        self._load: dict[int, float] = {}

    def choose(self, request: EngineRequest, replicas: Sequence[int]) -> int:
        """Returns the number of one of the replicas."""
        raise NotImplementedError

    def work(self, request: EngineRequest) -> float:
        """Returns the load that the request adds to its replica."""
        return 1.0

    def place(self, request: EngineRequest, replica: int) -> None:
        """Records the load of a request that goes to a replica."""
        work = self.work(request)
        self._placed[int(request.request_id)] = replica, work, request
        self._load[replica] = self._load.get(replica, 0.0) + work

    def ended(self, index: int, output_tokens: int) -> EngineRequest:
        """Records that a request has ended."""
        replica, work, request = self._placed.pop(index)
        self._load[replica] -= work
        return request

    def load(self, replica: int) -> float:
        return self._load.get(replica, 0.0)


class RoundRobin(Router):
    """Routes to the replicas in rotation."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0

    def choose(self, request: EngineRequest, replicas: Sequence[int]) -> int:
        self._turn += 1
        return replicas[(self._turn - 1) % len(replicas)]


class LeastLoaded(Router):
    """Routes to the replica with the fewest unfinished requests."""

    def choose(self, request: EngineRequest, replicas: Sequence[int]) -> int:
        return min(replicas, key=lambda replica: (self.load(replica), replica))


class PredictedWork(LeastLoaded):
    """Routes to the replica with the least predicted work, in device seconds: prompts, and outputs of predicted length.

    The router's own predictor learns from the requests that it has seen end.

    Attributes:
        seconds_per_prompt_token: cost of a token where others share the step.
        seconds_per_output_token: cost of a token where others share the step.
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
