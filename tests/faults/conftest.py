import asyncio

import pytest

from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.runner.model_runner import ModelRunner
from tests.faults import fault_server
from tests.server.fakes import WAIT_SECONDS, save_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The tiny model's tokenizer: a byte is a token, <bos> comes first."""
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def runner() -> ModelRunner:
    """A small model with random weights; what runs it makes its pool anew."""
    return ModelRunner(fault_server.CONFIG)


@pytest.fixture(scope="session")
def undisturbed(runner, tokenizer):
    """The answers to `fault_server.PROMPTS` of a server to which nothing happens."""

    async def ask():
        async with fault_server.serving_model(tokenizer, runner) as served:
            return await served.answers()

    return asyncio.run(asyncio.wait_for(ask(), WAIT_SECONDS))
