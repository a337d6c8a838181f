import pytest

from jaxserve.frontend.tokenizer import Tokenizer
from tests.server.fakes import save_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The tiny model's tokenizer: a byte is a token, <bos> comes first."""
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
