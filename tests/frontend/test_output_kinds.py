"""Updates of the three kinds against one another, for any deltas."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.delta import Delta
from jaxserve.frontend.output_kinds import OutputUpdates
from jaxserve.request import FinishReason
from jaxserve.sampling_params import RequestOutputKind

PIECES = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=3), st.text("ab ", max_size=3)), min_size=1, max_size=150
)


def deltas_of(pieces):
    count, deltas = 0, []
    for index, (ids, text) in enumerate(pieces):
        count += len(ids)
        reason = FinishReason.STOP if index == len(pieces) - 1 else None
        deltas.append(
            Delta(
                "r", tuple(ids), text, reason, stop_string="x" if reason else None, prompt_tokens=4, output_tokens=count
            )
        )
    return deltas


def updates_of(kind, deltas):
    updates = OutputUpdates(kind)
    return [updates.of(delta) for delta in deltas]


@given(PIECES, st.lists(st.integers(0, 2), max_size=40))
def test_each_sample_of_a_request_is_for_itself(pieces, order):
    """The deltas of three samples side by side, against each of them alone."""
    for kind in RequestOutputKind:
        together, apart = OutputUpdates(kind), [OutputUpdates(kind) for _ in range(3)]
        waiting = [[dataclasses.replace(delta, index=index) for delta in deltas_of(pieces)] for index in range(3)]
        for index in [*order, *(index for index in range(3) for _ in pieces)]:
            if waiting[index]:
                delta = waiting[index].pop(0)
                assert together.of(delta) == apart[index].of(delta)


@given(PIECES)
def test_the_kinds_say_the_same(pieces):
    deltas = deltas_of(pieces)
    assert updates_of(None, deltas) == updates_of(RequestOutputKind.DELTA, deltas) == deltas
    cumulative = updates_of(RequestOutputKind.CUMULATIVE, deltas)
    for index, update in enumerate(cumulative):
        assert update.text == "".join(text for _, text in pieces[: index + 1])
        assert list(update.token_ids) == [token for ids, _ in pieces[: index + 1] for token in ids]
        assert (update.finish_reason, update.output_tokens) == (deltas[index].finish_reason, len(update.token_ids))
    *before, last = updates_of(RequestOutputKind.FINAL_ONLY, deltas)
    assert before == [None] * len(before)
    assert last == cumulative[-1]
    assert last.stop_string == "x"
