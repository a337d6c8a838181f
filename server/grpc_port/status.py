"""Translates problems to gRPC statuses."""

from __future__ import annotations

import dataclasses

import grpc

from jaxserve.serving.problem import Code, Problem, problem_of

_CODES = {code: grpc.StatusCode[code.name] for code in Code}


@dataclasses.dataclass(frozen=True)
class Status:
    """A gRPC status: its code, one line for the client, and trailing metadata."""

    code: grpc.StatusCode
    details: str
    metadata: tuple[tuple[str, str], ...] = ()


def status(problem: Problem) -> Status:
    """Returns the gRPC status for a problem, with retry pushback where it says when to try again."""
    seconds = problem.retry_seconds
    pushback = () if seconds is None else (("grpc-retry-pushback-ms", str(round(1000 * seconds))),)
    return Status(_CODES[problem.code], problem.details, pushback)


def status_of(error: Exception) -> Status | None:
    """Returns the status to send for this error, or None for one that only a bug of ours can cause."""
    problem = problem_of(error)
    return None if problem is None else status(problem)
