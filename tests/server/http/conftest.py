import json

import pytest

from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.models.tiny.tiny_tokenizer import BOS, CHAT_TEMPLATE, EOS
from tests.server.fakes import save_tokenizer
from tests.server.http.http_harness import http_serving_in_thread


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory):
    """The tiny model's tokenizer, with its chat template."""
    directory = save_tokenizer(tmp_path_factory.mktemp("chat"))
    names = {"bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def server(chat_tokenizer):
    """A server in a thread, whose engine nobody may stop."""
    with http_serving_in_thread(chat_tokenizer) as served:
        yield served
