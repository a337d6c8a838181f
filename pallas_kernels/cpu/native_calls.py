"""Functions written in LLVM's instructions as targets of XLA's foreign function interface on CPUs.

What `ffi` does for functions compiled by numba, without a Python front end to run first: a module is compiled in a few
hundredths of a second. The layouts of XLA's structs are those of `ffi`.
"""

# The builder is llvmlite's, which has no types.
# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
from llvmlite import binding, ir

from jaxserve.pallas_kernels.cpu import ffi
from jaxserve.pallas_kernels.cpu.emitter import INT, SINGLE, WORD, Emitter

_NONE = ir.VoidType()

# Words of what the threads of one call share.
_NEXT, _DONE, _USERS, _ITEMS, _FRAME, _WORDS = range(6)

FLOATING = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes that `Call.read` reads, and their bytes."""

_BUFFER_DIMS = 5
"""Place of a buffer's dimensions, in words."""


class Call(Emitter):
    """Emits what reads a call of XLA: buffers of arguments and results, their dimensions."""

    def word(self, address: Any, place: int | Any) -> Any:
        """The word at a place, counted in words."""
        place = WORD(8 * place) if isinstance(place, int) else self.builder.shl(place, WORD(3))
        return self.load(self.at(address, place), WORD, 8)

    def put(self, value: Any, address: Any, place: int) -> None:
        """Stores a word at a place, counted in words."""
        self.store(value, self.at(address, 8 * place), 8)

    def argument(self, frame: Any, number: int) -> Any:
        """The buffer of an argument."""
        return self.word(self.word(frame, ffi.FRAME_ARGUMENTS), number)

    def result(self, frame: Any, number: int) -> Any:
        """The buffer of a result."""
        return self.word(self.word(frame, ffi.FRAME_RESULTS), number)

    def data(self, buffer: Any) -> Any:
        """Where a buffer's elements begin."""
        return self.word(buffer, ffi.BUFFER_DATA)

    def dim(self, buffer: Any, axis: int) -> Any:
        """A dimension of a buffer."""
        return self.word(self.word(buffer, _BUFFER_DIMS), axis)

    def add_atomically(self, state: Any, place: int, number: int) -> Any:
        """Adds to a word that threads share, in one order for all; what it was before."""
        pointer = self.builder.inttoptr(self.at(state, 8 * place), WORD.as_pointer())
        return self.builder.atomic_rmw("add", pointer, WORD(number), "seq_cst")

    def call_address(self, address: Any, argument: Any) -> Any:
        """Calls a C function of one word, which returns one."""
        kind = ir.FunctionType(WORD, [WORD])
        return self.builder.call(self.builder.inttoptr(address, kind.as_pointer()), [argument])

    def smaller(self, one: Any, other: Any) -> Any:
        """The smaller of two integers."""
        return self.builder.select(self.builder.icmp_signed("<", one, other), one, other)

    def times(self, count: Any, body: Callable[[Any], None]) -> None:
        """Runs body(index) for each index below count, which may be 0."""

        def run(index: Any, _: list[Any]) -> list[Any]:
            body(index)
            return []

        with self.builder.if_then(self.builder.icmp_signed(">", count, WORD(0))):
            self.loop(count, [], run)

    def loop_any(self, count: Any, initial: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """`loop` of a count that may be 0."""
        builder, before = self.builder, self.builder.block
        some, after = builder.append_basic_block("some"), builder.append_basic_block("none")
        builder.cbranch(builder.icmp_signed(">", count, WORD(0)), some, after)
        builder.position_at_end(some)
        results = self.loop(count, initial, body)
        end = builder.block
        builder.branch(after)
        builder.position_at_end(after)
        return [self.merged((one, before), (other, end)) for one, other in zip(initial, results, strict=True)]

    def merged(self, *values: tuple[Any, Any]) -> Any:
        """The value of the block that was left last."""
        phi = self.builder.phi(values[0][0].type)
        for value, block in values:
            phi.add_incoming(value, block)
        return phi

    def numbers(self, begin: Any, end: Any, count: int) -> list[Any]:
        """So many numbers from a first one on; the last one again where they would pass it."""
        last = self.builder.sub(end, WORD(1))
        return [self.smaller(self.builder.add(begin, WORD(number)), last) for number in range(count)]

    def places(self, base: Any, numbers: list[Any], length: Any, first: Any, size: int) -> list[Any]:
        """Where rows begin, from element `first` of each on; length and size are those of a row and of an element."""
        builder = self.builder
        return [
            self.at(base, builder.mul(builder.add(builder.mul(number, length), first), WORD(size)))
            for number in numbers
        ]

    def vectors(self, length: Any, first: Any, piece: int, lanes: int) -> tuple[Any, Any]:
        """Whole vectors of the piece of a row that begins with element `first`, and elements behind them."""
        count = self.smaller(self.builder.sub(length, first), WORD(piece))
        return self.builder.sdiv(count, WORD(lanes)), self.builder.srem(count, WORD(lanes))

    def parts(self, whole: Any, part: Any) -> Any:
        """Number of parts of a whole, the last of which may be smaller."""
        return self.builder.sdiv(self.builder.add(whole, self.builder.sub(part, WORD(1))), part)

    def first_lanes(self, count: Any, lanes: int) -> Any:
        """The mask of the first `count` lanes."""
        kind = ir.VectorType(INT, lanes)
        indices = ir.Constant(kind, list(range(lanes)))
        return self.builder.icmp_signed("<", indices, self.splat(self.builder.trunc(count, INT), lanes))

    def read(self, address: Any, dtype: str, lanes: int, mask: Any = None) -> Any:
        """A vector of elements of one of FLOATING as float32; zeros outside the mask, which are not read."""
        builder, size = self.builder, FLOATING[dtype]
        element = {"float32": SINGLE, "bfloat16": ir.IntType(16), "float16": ir.HalfType()}[dtype]
        kind = ir.VectorType(element, lanes)
        if mask is None:
            value = self.load(address, kind, size)
        else:
            letter = "i16" if dtype == "bfloat16" else f"f{8 * size}"
            pointer = builder.inttoptr(address, kind.as_pointer())
            name = f"llvm.masked.load.v{lanes}{letter}.p0"
            value = self.call(name, kind, pointer, INT(size), mask, ir.Constant(kind, None))
        if dtype == "float32":
            return value
        if dtype == "float16":
            return builder.fpext(value, ir.VectorType(SINGLE, lanes))
        ints = ir.VectorType(INT, lanes)
        high = builder.shl(builder.zext(value, ints), ir.Constant(ints, [16] * lanes))
        return builder.bitcast(high, ir.VectorType(SINGLE, lanes))

    def add_product(self, total: Any, left: Any, right: Any, fused: bool) -> Any:
        """total + left * right of vectors of float32, rounded once where it is fused."""
        if fused:
            return self.call(f"llvm.fma.v{total.type.count}f32", total.type, left, right, total)
        return self.builder.fadd(total, self.builder.fmul(left, right))


def function(module: Any, name: str, result: Any, arguments: list[Any], public: bool = False) -> tuple[Any, Call]:
    """Declares a function and opens its body; returns it and what emits into it."""
    made = ir.Function(module, ir.FunctionType(result, arguments), name)
    if not public:
        made.linkage = "internal"
    return made, Call(ir.IRBuilder(made.append_basic_block("entry")))


def add_copy(module: Any, lanes: int, tall: int, piece: int) -> Any:
    """Adds the function that copies a piece of so many rows of float32, vector by vector side by side, filled up with
    zeros: copy(x, copy, length, row, end_row, first).

    As they lie, rows of 4 KiB would meet in few places of the first cache.
    """
    made, emit = function(module, f"copy_{tall}", _NONE, [WORD] * 6)
    builder, (x, copy, length, row, end_row, first) = emit.builder, made.args
    places = emit.places(x, emit.numbers(row, end_row, tall), length, first, 4)
    steps, rest = emit.vectors(length, first, piece, lanes)

    def copy_step(index: Any, mask: Any = None) -> None:
        target = emit.at(copy, builder.mul(index, WORD(4 * lanes * tall)))
        for number, place in enumerate(places):
            value = emit.read(emit.at(place, builder.mul(index, WORD(4 * lanes))), "float32", lanes, mask)
            emit.store(value, emit.at(target, 4 * lanes * number), 4 * lanes)

    emit.times(steps, copy_step)
    with builder.if_then(builder.icmp_signed(">", rest, WORD(0))):
        copy_step(steps, emit.first_lanes(rest, lanes))
    builder.ret_void()
    return made


def add_handler(module: Any, name: str, num_items: Any, work: Any) -> None:
    """Adds the C function of a call frame that does `work(frame, item)` for each item of `num_items(frame)`.

    Items are shared among the calling thread and those of XLA's pool, each taking the next one that nobody has: which
    thread computes an item, and when, must not matter.
    """
    take = _add_take(module, name, work)
    task, emit = function(module, f"{name}_task", _NONE, [WORD], public=True)
    emit.builder.call(take, task.args)
    emit.builder.ret_void()
    handler, emit = function(module, name, WORD, [WORD], public=True)
    builder, frame = emit.builder, handler.args[0]
    extension = emit.word(frame, ffi.FRAME_EXTENSION)
    with builder.if_then(builder.icmp_signed("!=", extension, WORD(0))):
        # The call only asks which version of the interface the target speaks.
        version = emit.word(emit.word(frame, ffi.FRAME_API), ffi.API_VERSION)
        emit.put(version, emit.word(extension, ffi.EXTENSION_METADATA), ffi.METADATA_VERSION)
        builder.ret(WORD(0))
    items = builder.call(num_items, [frame])
    place = builder.ptrtoint(builder.alloca(WORD, 8), WORD)
    helpers = builder.sub(emit.smaller(items, num_threads(emit, frame, place)), WORD(1))
    with builder.if_then(builder.icmp_signed("<=", helpers, WORD(0))):
        emit.times(items, lambda item: builder.call(work, [frame, item]))
        builder.ret(WORD(0))
    state = emit.call("malloc", WORD, WORD(8 * _WORDS))
    for word, value in ((_NEXT, WORD(0)), (_DONE, WORD(0)), (_ITEMS, items), (_FRAME, frame)):
        emit.put(value, state, word)
    # This function looks at the state when its own share is done.
    emit.put(builder.add(helpers, WORD(2)), state, _USERS)

    def schedule(_: Any) -> None:
        context, address = emit.word(frame, ffi.FRAME_CONTEXT), builder.ptrtoint(task, WORD)
        for word, value in enumerate((WORD(40), WORD(0), context, address, state)):
            emit.put(value, place, word)
        error = emit.call_address(emit.word(emit.word(frame, ffi.FRAME_API), ffi.API_SCHEDULE), place)
        with builder.if_then(builder.icmp_signed("!=", error, WORD(0))):
            emit.add_atomically(state, _USERS, -1)

    emit.times(helpers, schedule)
    builder.call(take, [state])
    waiting, done = builder.append_basic_block("waiting"), builder.append_basic_block("done")
    builder.branch(waiting)
    builder.position_at_end(waiting)
    finished = emit.add_atomically(state, _DONE, 0)
    builder.cbranch(builder.icmp_signed("<", finished, items), waiting, done)
    builder.position_at_end(done)
    _leave(emit, state)
    builder.ret(WORD(0))


def _add_take(module: Any, name: str, work: Any) -> Any:
    """The function that works off the items of a state until nobody needs to."""
    take, emit = function(module, f"{name}_take", _NONE, [WORD])
    builder, state = emit.builder, take.args[0]
    frame, items = emit.word(state, _FRAME), emit.word(state, _ITEMS)
    following, working, over = (builder.append_basic_block(each) for each in ("following", "working", "over"))
    builder.branch(following)
    builder.position_at_end(following)
    item = emit.add_atomically(state, _NEXT, 1)
    builder.cbranch(builder.icmp_signed("<", item, items), working, over)
    builder.position_at_end(working)
    builder.call(work, [frame, item])
    emit.add_atomically(state, _DONE, 1)
    builder.branch(following)
    builder.position_at_end(over)
    _leave(emit, state)
    builder.ret_void()
    return take


def _leave(emit: Call, state: Any) -> None:
    """Leaves what threads share: a task may start after the call even, and who comes last frees it."""
    last = emit.builder.icmp_signed("==", emit.add_atomically(state, _USERS, -1), WORD(1))
    with emit.builder.if_then(last):
        emit.call("free", _NONE, state)


def num_threads(emit: Call, frame: Any, place: Any) -> Any:
    """Threads of XLA's pool; place: 5 words of memory."""
    answer = emit.at(place, 32)
    for word, value in enumerate((WORD(32), WORD(0), emit.word(frame, ffi.FRAME_CONTEXT), answer, WORD(1))):
        emit.put(value, place, word)
    emit.call_address(emit.word(emit.word(frame, ffi.FRAME_API), ffi.API_NUM_THREADS), place)
    # What is answered is a number of 4 bytes or 8, in memory that held a small one.
    return emit.builder.zext(emit.builder.trunc(emit.word(place, 4), INT), WORD)


@functools.cache
def features() -> frozenset[str]:
    """Instruction sets of this machine's processor, by LLVM's names ("avx512f")."""
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def register(name: str, build: Callable[[Any, str], None], *, optimize: bool = True) -> None:
    """Makes the function that build(module, name) adds to a module known to XLA, for good; does nothing where it is.

    Before a program that calls it is compiled or loaded. Threads may call it at once.

    optimize: LLVM's usual passes are run; without them variables move to registers and little else happens, in a tenth
        of the time.
    """
    with _LOCK:
        if name in _ENGINES:
            return
        module = ir.Module(name)
        build(module, name)
        engine = _compiled(str(module), optimize)
        address = engine.get_function_address(name)
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform="cpu", api_version=1)
        _ENGINES[name] = engine


def _compiled(text: str, optimize: bool) -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(text)
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=2
    )
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    tuning = binding.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_unrolling = tuning.loop_vectorization = tuning.slp_vectorization = False
    passes = binding.create_pass_builder(machine, tuning)
    (passes.getModulePassManager() if optimize else _few_passes()).run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


def _few_passes() -> Any:
    passes = binding.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_simplify_cfg_pass()
    passes.add_instruction_combine_pass()
    passes.add_new_gvn_pass()
    passes.add_simplify_cfg_pass()
    passes.add_aggressive_dce_pass()
    return passes


_LOCK = threading.Lock()
_ENGINES: dict[str, Any] = {}
"""What holds the functions that XLA knows, kept from being freed."""
