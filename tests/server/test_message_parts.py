"""Replies that are made in parts are, byte for byte, those of one call; what is counted unread is what is parsed."""

import random

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.id_checks import IDS_PER_PART
from jaxserve.frontend import tokenizer as tokenizer_module
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.serving.grpc_port import message_parts
from jaxserve.serving.grpc_port.message_parts import numbers_of, of_one_field, value_of
from jaxserve.serving.grpc_port.oversized import MAX_DETOKENIZED, check_detokenize
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from tests.budgets import budget
from tests.server import harness
from tests.server.fakes import save_tokenizer
from tests.server.harness import Served, run_served, status_of

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=30)


@budget(50)
@given(parts=st.lists(IDS, max_size=5))
def test_token_ids_in_parts_are_the_message_of_all(parts):
    values = [value_of(pb.TokenizeResponse(token_ids=part).SerializeToString()) for part in parts]
    whole = pb.TokenizeResponse(token_ids=[token_id for part in parts for token_id in part])
    assert of_one_field(pb.TokenizeResponse.TOKEN_IDS_FIELD_NUMBER, values) == whole.SerializeToString()


@budget(50)
@given(parts=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=300), max_size=5))
def test_a_text_in_parts_is_the_message_of_all(parts):
    found = of_one_field(pb.DetokenizeResponse.TEXT_FIELD_NUMBER, [part.encode() for part in parts])
    assert found == pb.DetokenizeResponse(text="".join(parts)).SerializeToString()


NUMBERS = st.lists(st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(0, 300)), max_size=40)


@budget(100)
@given(NUMBERS, st.integers(11, 60))
def test_numbers_are_read_as_protobuf_does(numbers, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message_parts, "_BLOCK", size)
        found = numbers_of(value_of(pb.DetokenizeRequest(token_ids=numbers).SerializeToString()))
    assert found.tolist() == numbers
    assert found.dtype == np.int32


def unpacked(token_ids):
    return b"".join(b"\x08" + value_of(pb.TokenizeResponse(token_ids=[one]).SerializeToString()) for one in token_ids)


@pytest.mark.parametrize("largest", [100, 2**31 - 1])
@pytest.mark.parametrize("more", [0, 1])
def test_token_ids_are_counted_as_they_are_parsed(largest, more):
    """Packed in one field or several, singly, negative ones of ten bytes, and other fields beside them."""
    numbers = random.Random(0)
    fields = [[numbers.choice((largest, 5, -1)) for _ in range(count)] for count in (100, 70_000, 0)]
    rest = MAX_DETOKENIZED + more - sum(map(len, fields)) - 3
    messages = [pb.DetokenizeRequest(token_ids=ids).SerializeToString() for ids in (*fields, [largest] * rest)]
    data = b"".join([*messages[:2], unpacked([3, largest, 4]), *messages[2:], b"\xfa\x07\x02\x01\x01"])
    assert len(pb.DetokenizeRequest.FromString(data).token_ids) == MAX_DETOKENIZED + more
    if not more:
        check_detokenize(data)
    else:
        with pytest.raises(ValueError, match=r"^token_ids has 1048577 ids; at most 1048576 are allowed$"):
            check_detokenize(data)


def test_replies_in_parts_are_those_of_one_call(tmp_path, monkeypatch):
    """Over gRPC; the longest from a process of their own."""
    monkeypatch.setattr(harness, "MAX_MESSAGE_BYTES", 4 * 1024 * 1024)
    monkeypatch.setattr(tokenizer_module, "LONG_TEXT", 5000)
    monkeypatch.setattr(tokenizer_module, "LONG_IDS", 5000)
    tokenizer = Tokenizer(save_tokenizer(tmp_path))

    async def body(served: Served) -> None:
        async with grpc.aio.insecure_channel(served.address) as channel:
            for count in (0, 3, 2 * IDS_PER_PART):
                ids = random.Random(count).choices(range(tokenizer.vocab_size), k=count)
                text = tokenizer._backend.decode(ids)
                call = channel.unary_unary("/jaxserve.v1.JaxServe/Detokenize")
                answer = await call(pb.DetokenizeRequest(token_ids=ids).SerializeToString())
                assert answer == pb.DetokenizeResponse(text=text).SerializeToString()
                call = channel.unary_unary("/jaxserve.v1.JaxServe/Tokenize")
                answer = await call(pb.TokenizeRequest(text=text).SerializeToString())
                ids = tokenizer._backend.encode(text).ids
                assert answer == pb.TokenizeResponse(token_ids=ids).SerializeToString()
            too_many = pb.DetokenizeRequest(token_ids=[3] * (MAX_DETOKENIZED + 1))
            code, details = await status_of(served.client.detokenize(too_many.token_ids))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details == "token_ids has 1048577 ids; at most 1048576 are allowed"

    run_served(body, tokenizer)
