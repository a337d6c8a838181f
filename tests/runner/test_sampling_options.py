"""Every sampling option of a row against float64: processed logits, and the frequencies of what is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from jaxserve.engine.constraints import pack_mask
from jaxserve.engine.constraints.token_masks import TokenMasks
from jaxserve.programs.penalties import Penalties, add_ids, counted
from jaxserve.programs.sampler import processed_logits, sample
from jaxserve.programs.slots import Slots
from jaxserve.programs.state_programs import write_options
from jaxserve.request import EngineRequest
from jaxserve.runner.packing import ForwardPacker, option_vectors, penalty_vectors
from jaxserve.sampling_params import ADMITTED_FIELDS
from jaxserve.scheduler.plan import NO_DECODES, NO_SAMPLES, NOTHING_ALLOWED, PenaltyWrite, RowPlan, StepPlan
from tests.budgets import budget
from tests.runner.sampling_reference import margin, processed, softmax

VOCAB, ROWS = 60, 8
PACKER = ForwardPacker(8, ROWS, 16, ROWS)
MASKS = TokenMasks(VOCAB)
DRAWS = 20_000

add_jit = {
    size: jax.jit(lambda penalties, vector, size=size: add_ids(penalties, vector, ids=size)) for size in (64, 512)
}
apply_jit = jax.jit(lambda slots, vector: slots.apply(PACKER.layout.read(vector)))
options_jit = jax.jit(write_options)
processed_jit = {on_cpu: jax.jit(lambda *a, c=on_cpu: processed_logits(*a, on_cpu=c)) for on_cpu in (True, False)}
sample_jit = jax.jit(sample)


@dataclasses.dataclass
class Row:
    """A request and its output so far. suppress: its stop tokens may not be drawn yet."""

    request: EngineRequest
    output: tuple[int, ...] = ()
    suppress: bool = False

    def reference(self, logits: np.ndarray) -> np.ndarray:
        request = self.request
        return processed(
            logits,
            prompt=request.prompt_token_ids,
            output=self.output,
            forbidden=request.stop_token_ids if self.suppress else (),
            **{name: getattr(request, name) for name in (*OPTIONS, "allowed_token_ids", "bad_words_token_ids")},
        )


OPTIONS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias",
)  # fmt: skip


def row(output: Sequence[int] = (), suppress: bool = False, prompt: Sequence[int] = (3, 4, 4), **options: Any) -> Row:
    return Row(EngineRequest("r", tuple(prompt), 100, **options), tuple(output), suppress)


class Device:
    """The arrays of rows that have been admitted, each in a slot and a penalty row of another number than its own."""

    def __init__(self, rows: Sequence[Row]):
        self.slots, self.penalties = Slots.zeros(ROWS, 4), Penalties.zeros(ROWS, VOCAB)
        chunks, writes = [], []
        for number, one in enumerate(rows):
            penalty_row = (number + 3) % ROWS if one.request.penalized else None
            admitted = RowPlan("r", 0, ROWS - 1 - number, 0, (1,), 0, (), one.request, penalty_row=penalty_row)
            chunks.append(admitted)
            if penalty_row is not None:
                writes.append(PenaltyWrite(penalty_row, one.request.prompt_token_ids, one.output))
        plan = StepPlan(0, NO_DECODES, tuple(chunks), NO_SAMPLES, 8, 0, len(chunks))
        self.slots = apply_jit(self.slots, PACKER.pack(plan))
        for vector in option_vectors(plan.chunks):
            self.slots = options_jit(self.slots, vector)
        for size, vector in penalty_vectors(writes):
            self.penalties = add_jit[size](self.penalties, vector)
        self.masks = np.zeros((ROWS, -(-VOCAB // 32)), np.uint32)
        masked = np.zeros(ROWS, np.int32)
        for number, one in enumerate(rows):
            if MASKS.constrains(one.request):
                self.masks[ROWS - 1 - number] = MASKS.mask(one.request, one.output)
                masked[number] = 1
        suppress = np.zeros(ROWS, np.int32)
        suppress[: len(rows)] = [one.suppress for one in rows]
        slot = np.where(np.arange(ROWS) < len(rows), ROWS - 1 - np.arange(ROWS), ROWS)
        self.fields = {"slot": slot, "position": np.zeros(ROWS), "suppress_stop": suppress, "masked": masked}
        self.fields = {name: np.asarray(field, np.int32) for name, field in self.fields.items()}

    def arguments(self, logits: np.ndarray) -> tuple[Any, ...]:
        return jnp.asarray(logits, jnp.float32), self.slots, self.masks, self.penalties, self.fields

    def processed(self, logits: np.ndarray, on_cpu: bool = True) -> np.ndarray:
        return np.asarray(processed_jit[on_cpu](*self.arguments(logits)))

    def draw(self, logits: np.ndarray, position: int = 0) -> np.ndarray:
        self.fields["position"] = np.full(ROWS, position, np.int32)
        return np.asarray(sample_jit(*self.arguments(logits)))


def relative(values: np.ndarray, temperature: float) -> np.ndarray:
    """Processed logits without the constant that changes no probability; filters may remove the largest."""
    return values - values[np.isfinite(values)].max() if np.isfinite(values).any() else values


def check(rows: Sequence[Row], logits: np.ndarray) -> None:
    logits = logits.astype(np.float32)
    device = Device(rows)
    for on_cpu in (True, False):
        found = device.processed(logits, on_cpu)
        for number, one in enumerate(rows):
            expected = relative(one.reference(logits[number]), one.request.temperature)
            got = relative(found[number].astype(np.float64), one.request.temperature)
            assert_array_equal(np.isfinite(got), np.isfinite(expected), err_msg=str(one))
            kept = np.isfinite(expected)
            assert_allclose(got[kept], expected[kept], rtol=1e-5, atol=1e-5, err_msg=str(one))


ids = st.integers(0, VOCAB - 1)
lists = st.lists(ids, max_size=12).map(tuple)
some_ids = st.lists(ids, min_size=1, max_size=30, unique=True).map(tuple)


@st.composite
def rows_of_options(draw: Any) -> Row:
    def maybe(values: st.SearchStrategy, default: Any) -> Any:
        return draw(values) if draw(st.booleans()) else default

    options = {
        "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        "top_k": maybe(st.sampled_from([1, 5, 20, 59]), 0),
        "top_p": maybe(st.sampled_from([0.05, 0.5, 0.9, 0.99]), 1.0),
        "min_p": maybe(st.sampled_from([0.01, 0.2]), 0.0),
        "typical_p": maybe(st.sampled_from([0.1, 0.5, 0.9]), 1.0),
        "presence_penalty": maybe(st.sampled_from([-2.0, -0.3, 0.7, 2.0]), 0.0),
        "frequency_penalty": maybe(st.sampled_from([-2.0, -0.11, 0.31, 2.0]), 0.0),
        "repetition_penalty": maybe(st.sampled_from([0.4, 1.3, 2.0, 50.0]), 1.0),
        "logit_bias": maybe(
            st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=8).map(lambda d: tuple(sorted(d.items()))), ()
        ),
        "allowed_token_ids": maybe(some_ids, None),
        "bad_words_token_ids": maybe(
            st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple), ()
        ),
        "stop_token_ids": maybe(st.lists(ids, min_size=1, max_size=5, unique=True).map(tuple), ()),
    }
    output = draw(lists)
    if options["bad_words_token_ids"] and draw(st.booleans()):  # let a word be about to be completed
        output += options["bad_words_token_ids"][0][:-1]
    return row(output, draw(st.booleans()), prompt=draw(lists) or (1,), **options)


def decided(one: Row, logits: np.ndarray) -> bool:
    """Whether float32 must keep what float64 does: something is left, and no limit falls between two roundings."""
    request = one.request
    before = processed(
        logits, prompt=request.prompt_token_ids, output=one.output,
        forbidden=request.stop_token_ids if one.suppress else (),
        bad_words_token_ids=request.bad_words_token_ids, allowed_token_ids=request.allowed_token_ids,
        **{name: getattr(request, name) for name in OPTIONS if name not in ("top_k", "top_p", "min_p", "typical_p")},
    )  # fmt: skip
    if not np.isfinite(before).any() or not np.isfinite(one.reference(logits)).any():
        return False
    if request.temperature == 0:
        return True
    filters = {name: getattr(request, name) for name in ("top_k", "top_p", "min_p", "typical_p")}
    chances = softmax(before)
    floor = np.abs(chances / chances.max() - request.min_p)[chances > 0].min() if request.min_p else 1.0
    finite = np.sort(before[np.isfinite(before)])
    gap = np.diff(finite).min() if request.top_k and len(finite) > 1 else 1.0
    return min(margin(before, **filters), floor, gap) > 1e-4


@budget(150)
@given(st.lists(rows_of_options(), min_size=1, max_size=ROWS), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 3.0]))
def test_processed_logits_are_those_of_float64(rows, seed, spread):
    logits = np.random.default_rng(seed).standard_normal((ROWS, VOCAB)).astype(np.float32) * spread
    usual = row(temperature=0.0)
    rows = [one if decided(one, logits[number].astype(np.float64)) else usual for number, one in enumerate(rows)]
    assume(any(one is not usual for one in rows))
    check(rows, logits)


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "typical_p": {"typical_p": 0.6},
    "presence_penalty": {"presence_penalty": 1.5, "output": (0, 0, 2)},
    "frequency_penalty": {"frequency_penalty": 0.8, "output": (0, 0, 2)},
    "repetition_penalty": {"repetition_penalty": 1.8, "output": (0, 1), "prompt": (5, 5)},
    "logit_bias": {"logit_bias": ((1, -2.0), (7, 1.5))},
    "allowed_token_ids": {"allowed_token_ids": (0, 3, 8)},
    "bad_words": {"bad_words_token_ids": ((2,), (9, 0)), "output": (4, 9)},
    "min_tokens": {"stop_token_ids": (0, 6), "suppress": True},
    "all": {
        "temperature": 1.4, "top_k": 8, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95, "presence_penalty": 0.3,
        "frequency_penalty": -0.4, "repetition_penalty": 1.1, "logit_bias": ((1, 0.5),), "output": (0, 0, 2),
        "bad_words_token_ids": ((0, 2, 4),), "stop_token_ids": (6,), "suppress": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_frequencies_of_float64(case):
    """Chi-square over 20,000 draws at fixed seeds; one call draws many, as rows of one vocabulary of 10."""
    vocab, rows = 10, 2_000
    logits = np.linspace(1.5, -1.5, vocab).astype(np.float32)
    one = row(**{"temperature": 1.0, **CASES[case]})
    request = one.request
    packer = ForwardPacker(8, 8, 16, 8)
    plan = StepPlan(0, NO_DECODES, (RowPlan("r", 0, 0, 0, (1,), 0, (), request, penalty_row=0),), NO_SAMPLES, 8, 0, 1)
    slots = Slots.zeros(8, 4).apply(packer.layout.read(packer.pack(plan)))
    for vector in option_vectors(plan.chunks):
        slots = write_options(slots, vector)
    penalties = Penalties.zeros(1, vocab)
    for size, vector in penalty_vectors([PenaltyWrite(0, request.prompt_token_ids, one.output)]):
        penalties = add_jit[size](penalties, vector)
    masks = np.zeros((8, 1), np.uint32)
    constraints = TokenMasks(vocab)
    if constraints.constrains(request):
        masks[0] = constraints.mask(request, one.output)
    fields = {
        "slot": np.zeros(rows, np.int32),
        "suppress_stop": np.full(rows, one.suppress, np.int32),
        "masked": np.full(rows, constraints.constrains(request), np.int32),
    }
    draws = []
    for call in range(DRAWS // rows):
        position = np.arange(call * rows, (call + 1) * rows, dtype=np.int32)
        draws.append(
            np.asarray(sample_jit(np.tile(logits, (rows, 1)), slots, masks, penalties, fields | {"position": position}))
        )
    counts = np.bincount(np.concatenate(draws), minlength=vocab)
    chances = softmax(one.reference(logits))
    assert counts[chances == 0].sum() == 0
    possible = chances > 0
    expected = chances[possible] * DRAWS
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    limits = {0: 1e-9, 1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88}
    assert statistic <= limits[possible.sum() - 1], (statistic, counts, expected)  # the 0.1 % points


def test_rows_without_options_are_the_same_to_the_bit_beside_any_others():
    logits = np.random.default_rng(1).standard_normal((ROWS, VOCAB)).astype(np.float32)
    plain = [row(temperature=temperature, seed=seed) for seed, temperature in enumerate((0.0, 1.0, 0.7, 0.0))]
    others = [
        row(CASES["all"]["output"], True, **{k: v for k, v in CASES["all"].items() if k not in ("output", "suppress")}),
        row(temperature=0.0, presence_penalty=2.0, output=(1, 2)),
        row(allowed_token_ids=(5, 6)),
        row(bad_words_token_ids=((7,),)),
    ]
    alone, beside = Device(plain), Device([*plain, *others])
    for position in range(5):
        assert_array_equal(beside.draw(logits, position)[:4], alone.draw(logits, position)[:4])
    assert_array_equal(beside.processed(logits)[:4], alone.processed(logits)[:4])


def test_a_row_of_which_nothing_is_left_is_told_and_others_go_on():
    logits = np.random.default_rng(2).standard_normal((ROWS, VOCAB)).astype(np.float32)
    rows = [
        row(allowed_token_ids=(5, 6), stop_token_ids=(5, 6), suppress=True),
        row(allowed_token_ids=(5,), bad_words_token_ids=((5,),), temperature=0.0),
        row(temperature=0.0),
        row(allowed_token_ids=(5,), temperature=0.0, logit_bias=((5, -100.0),)),
    ]
    drawn = Device(rows).draw(logits)
    assert drawn[:2].tolist() == [NOTHING_ALLOWED, NOTHING_ALLOWED]
    assert drawn[2:4].tolist() == [logits[2].argmax(), 5]


@pytest.mark.parametrize("penalty", [1e-40, 1e-3, 1000.0])
def test_extreme_penalties_stay_finite(penalty):
    logits = np.random.default_rng(3).standard_normal((ROWS, VOCAB)).astype(np.float32) * 50
    rows = [
        row(output=(1, 2, 3), repetition_penalty=penalty, temperature=t, frequency_penalty=-2.0) for t in (0.0, 1.0)
    ]
    device = Device(rows)
    assert not np.isnan(device.processed(logits)[:2]).any()
    assert ((device.draw(logits)[:2] >= 0) & (device.draw(logits)[:2] < VOCAB)).all()


# ------------------------------------------------------------------------------------------------------- penalty rows


@budget(60)
@given(
    st.lists(ids, min_size=1, max_size=700), st.lists(ids, max_size=700), st.integers(0, 2), st.lists(ids, max_size=5)
)
def test_a_row_holds_the_ids_that_are_added(prompt, output, target, drawn):
    """In runs of any length, whatever the row had before; and other rows are not touched."""
    penalties = Penalties(jnp.full((3, VOCAB), 7, jnp.uint16), jnp.full((3, 2), 0xFFFFFFFF, jnp.uint32))
    for size, vector in penalty_vectors([PenaltyWrite(target, tuple(prompt), tuple(output))]):
        penalties = (
            jax.jit(lambda p, v, size=size: add_ids(p, v, ids=size))(penalties, vector)
            if size > 512
            else add_jit[size](penalties, vector)
        )
    for token in drawn:
        penalties = counted(penalties, jnp.array([target, -1], jnp.int32), jnp.array([token, token], jnp.int32))
    for number in range(3):
        counts, bits = np.asarray(penalties.counts[number]), np.asarray(penalties.prompts[number])
        if number != target:
            assert (counts == 7).all()
            assert (bits == 0xFFFFFFFF).all()
            continue
        assert_array_equal(counts, np.bincount([*output, *drawn], minlength=VOCAB))
        assert_array_equal(bits, pack_mask(np.isin(np.arange(VOCAB), prompt)))


def test_counts_end_at_their_largest():
    penalties = Penalties(jnp.full((1, VOCAB), 65_534, jnp.uint16), jnp.zeros((1, 2), jnp.uint32))
    for expected in (65_535, 65_535):
        penalties = counted(penalties, jnp.array([0]), jnp.array([5]))
        assert penalties.counts[0, 5] == expected
    vector = penalty_vectors([PenaltyWrite(0, (1,), (9,) * 63)])[0][1].copy()
    vector[1] = 0  # without emptying the row
    assert add_jit[64](penalties, vector).counts[0, 9] == 65_535


def test_padding_and_failed_rows_count_nothing():
    penalties = Penalties.zeros(2, VOCAB)
    rows, drawn = jnp.array([0, -1, 1], jnp.int32), jnp.array([NOTHING_ALLOWED, 4, 6], jnp.int32)
    assert_array_equal(np.argwhere(np.asarray(counted(penalties, rows, drawn).counts)), [[1, 6]])
    vector = penalty_vectors([PenaltyWrite(2, (1,), (9,))])[0][1]  # a row that does not exist
    assert not np.asarray(add_jit[64](penalties, vector).counts).any()


def test_a_slot_forgets_the_options_of_the_request_before():
    logits = np.random.default_rng(4).standard_normal((ROWS, VOCAB)).astype(np.float32)
    device = Device([row(allowed_token_ids=(5,), logit_bias=((6, 100.0),), repetition_penalty=5.0, temperature=0.0)])
    assert device.draw(logits)[0] == 5
    slots = device.slots
    device.slots = apply_jit(
        slots,
        PACKER.pack(
            StepPlan(
                0,
                NO_DECODES,
                (RowPlan("r", 0, ROWS - 1, 0, (1,), 0, (), row(temperature=0.0).request),),
                NO_SAMPLES,
                8,
                0,
                1,
            )
        ),
    )
    assert device.draw(logits)[0] == logits[0].argmax()
    assert set(ADMITTED_FIELDS) <= set(device.slots.sampling)
