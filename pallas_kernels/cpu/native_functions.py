"""Compiles functions of a small part of Python to LLVM's instructions.

Kernels whose Python is integers, loops and calls need no type inference: what a general compiler spends seconds on at
each start takes hundredths of a second. `native` marks such a function. It may assign to names, and use `if`, `while`,
`for` over `range`, `break`, `continue`, `return`, arithmetic and comparisons of integers with Python's meaning, `and`,
`or`, `not`, `min` and `max`. Values are int64, float32 (constants with a point, passed on only) or truth values; names
of modules stand for constants, a `Parameter`, and other functions: `native`, `Inline` or `Routine`.
"""

# The builder is llvmlite's, which has no types.
# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from jaxserve.pallas_kernels.cpu import native_calls
from jaxserve.pallas_kernels.cpu.emitter import SINGLE, WORD

_TRUTH = ir.IntType(1)


class Native:
    """A function that `Program` can compile. Called from Python, it runs as Python."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    @functools.cached_property
    def tree(self) -> ast.FunctionDef:
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        return tree


def native(function: Callable[..., Any]) -> Native:
    """Marks a function as one that `Program` compiles."""
    return Native(function)


class Inline:
    """Instructions that stand in the caller's place: emit(emitter, *values) returns a value or None."""

    def __init__(self, emit: Callable[..., Any]) -> None:
        functools.update_wrapper(self, emit)
        self.emit = emit

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError(f"{self.emit.__name__} is called by compiled functions only")


class Routine:
    """A function without a result whose body emit(emitter, *values) writes; kinds: the types of its arguments."""

    def __init__(self, kinds: tuple[Any, ...], emit: Callable[..., None], name: str) -> None:
        self.kinds, self.emit, self.name = kinds, emit, name

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError(f"{self.name} is called by compiled functions only")


class Parameter:
    """Stands for an integer that a `Program` is compiled with: the attribute of this name of its parameters."""

    def __init__(self, name: str) -> None:
        self.name = name


class Emit(native_calls.Call):
    """Emits into a function of a program."""

    def __init__(self, builder: Any, program: Program) -> None:
        super().__init__(builder)
        self.program = program

    @property
    def parameters(self) -> Any:
        return self.program.parameters

    def memory(self, words: int) -> Any:
        """The address of words of the stack, the same in every turn of a loop."""
        with self.builder.goto_entry_block():
            return self.builder.ptrtoint(self.builder.alloca(WORD, words), WORD)


class Program:
    """The functions of one module, each compiled when the first that calls it is."""

    def __init__(self, module: Any, parameters: Any = None) -> None:
        self.module, self.parameters = module, parameters
        self._made: dict[Any, Any] = {}

    def function(self, called: Native | Routine, *kinds: Any) -> Any:
        """The LLVM function of `called` for arguments of these types."""
        key = called, tuple(map(str, kinds))
        if key not in self._made:
            self._made[key] = self._make(called, kinds)
        return self._made[key]

    def _make(self, called: Native | Routine, kinds: tuple[Any, ...]) -> Any:
        name = called.name if isinstance(called, Routine) else called.function.__name__
        returns = isinstance(called, Native) and any(
            isinstance(node, ast.Return) and node.value is not None for node in ast.walk(called.tree)
        )
        kind = ir.FunctionType(WORD if returns else ir.VoidType(), kinds)
        made = ir.Function(self.module, kind, self.module.get_unique_name(name))
        made.linkage = "internal"
        emit = Emit(ir.IRBuilder(made.append_basic_block("entry")), self)
        if isinstance(called, Routine):
            called.emit(emit, *made.args)
            if not emit.builder.block.is_terminated:
                emit.builder.ret_void()
        else:
            _Body(emit, called, made).write()
        return made


_ARITHMETIC: dict[type, tuple[Callable[[Any, Any], Any], str]] = {
    ast.Add: (operator.add, "add"),
    ast.Sub: (operator.sub, "sub"),
    ast.Mult: (operator.mul, "mul"),
    ast.BitAnd: (operator.and_, "and_"),
    ast.BitOr: (operator.or_, "or_"),
    ast.LShift: (operator.lshift, "shl"),
    ast.RShift: (operator.rshift, "ashr"),
}
_DIVISIONS: dict[type, Callable[[Any, Any], Any]] = {ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
_COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}


class _Body:
    """Writes the body of one function."""

    def __init__(self, emit: Emit, called: Native, made: Any) -> None:
        self._emit, self._builder, self._called, self._made = emit, emit.builder, called, made
        self._variables: dict[str, Any] = {}
        self._loops: list[tuple[Any, Any]] = []

    def write(self) -> None:
        tree = self._called.tree
        for argument, value in zip(tree.args.args, self._made.args, strict=True):
            self._assign(argument.arg, value)
        self._statements(tree.body)
        if not self._builder.block.is_terminated:
            if isinstance(self._made.function_type.return_type, ir.VoidType):
                self._builder.ret_void()
            else:
                self._builder.unreachable()

    def _refuse(self, node: ast.AST) -> SyntaxError:
        name, line = self._called.function.__qualname__, getattr(node, "lineno", 0)
        return SyntaxError(f"{name}, line {line}: cannot compile {ast.unparse(node)!r}")

    # Statements.

    def _statements(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if self._builder.block.is_terminated:
                break
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._assign(name, self._value(value))
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)) if len(names) == len(values):
                for name, value in zip(names, [self._value(value) for value in values], strict=True):
                    self._assign(name.id, value)
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                self._assign(name, self._arithmetic(node, op, self._read(name), self._value(value)))
            case ast.Expr(value=ast.Call() as call):
                self._call(call)
            case ast.Expr(value=ast.Constant(value=str())):
                pass
            case ast.Return(value=None):
                self._builder.ret_void()
            case ast.Return(value=ast.expr() as value):
                self._builder.ret(self._word(self._value(value)))
            case ast.Continue():
                self._builder.branch(self._loops[-1][0])
            case ast.Break():
                self._builder.branch(self._loops[-1][1])
            case ast.If():
                self._if(node)
            case ast.While(orelse=[]):
                self._loop(lambda: self._condition(node.test), node.body, lambda: None)
            case ast.For(target=ast.Name(), iter=ast.Call(func=ast.Name(id="range")), orelse=[]):
                self._for(node)
            case _:
                raise self._refuse(node)

    def _assign(self, name: str, value: Any) -> None:
        if name not in self._variables:
            with self._builder.goto_entry_block():
                self._variables[name] = self._builder.alloca(value.type, name=name)
        self._builder.store(value, self._variables[name])

    def _read(self, name: str) -> Any:
        return self._builder.load(self._variables[name])

    def _block(self, name: str) -> Any:
        return self._builder.append_basic_block(name)

    def _if(self, node: ast.If) -> None:
        then, otherwise, after = self._block("then"), self._block("else"), self._block("after")
        self._builder.cbranch(self._condition(node.test), then, otherwise)
        for block, statements in ((then, node.body), (otherwise, node.orelse)):
            self._builder.position_at_end(block)
            self._statements(statements)
            if not self._builder.block.is_terminated:
                self._builder.branch(after)
        self._builder.position_at_end(after)

    def _for(self, node: ast.For) -> None:
        assert isinstance(node.target, ast.Name)
        assert isinstance(node.iter, ast.Call)
        limits = [self._value(limit) for limit in node.iter.args]
        first, stop = (WORD(0), limits[0]) if len(limits) == 1 else limits[:2]
        step = limits[2] if len(limits) == 3 else WORD(1)
        if not (isinstance(step, ir.Constant) and step.constant > 0):
            raise self._refuse(node.iter)
        with self._builder.goto_entry_block():
            index = self._builder.alloca(WORD)
        self._builder.store(first, index)

        def more() -> Any:
            following = self._builder.load(index)
            self._assign(node.target.id, following)
            return self._builder.icmp_signed("<", following, stop)

        self._loop(
            more, node.body, lambda: self._builder.store(self._builder.add(self._builder.load(index), step), index)
        )

    def _loop(self, more: Callable[[], Any], body: list[ast.stmt], turn: Callable[[], Any]) -> None:
        head, inside, following, after = (self._block(name) for name in ("head", "body", "next", "after"))
        self._builder.branch(head)
        self._builder.position_at_end(head)
        self._builder.cbranch(more(), inside, after)
        self._builder.position_at_end(inside)
        self._loops.append((following, after))
        self._statements(body)
        self._loops.pop()
        if not self._builder.block.is_terminated:
            self._builder.branch(following)
        self._builder.position_at_end(following)
        turn()
        self._builder.branch(head)
        self._builder.position_at_end(after)

    # Expressions.

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name) if name in self._variables:
                return self._read(name)
            case ast.Constant() | ast.Name() | ast.Attribute():
                return self._constant(node)
            case ast.BinOp(left=left, op=op, right=right):
                return self._arithmetic(node, op, self._value(left), self._value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self._value(operand)
                return value.type(-value.constant) if isinstance(value, ir.Constant) else self._builder.neg(value)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self._builder.not_(self._condition(operand))
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._comparison(node, ops, [self._value(each) for each in (left, *others)])
            case ast.BoolOp(op=op, values=values):
                return self._connective(isinstance(op, ast.And), values)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._choice(self._condition(test), lambda: self._value(body), lambda: self._value(orelse))
            case ast.Call():
                return self._call(node)
            case _:
                raise self._refuse(node)

    def _object(self, node: ast.expr) -> Any:
        """What a name of the module, or an attribute of such, stands for."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                scope = self._called.function.__globals__
                if name in scope or hasattr(builtins, name):
                    return scope.get(name, getattr(builtins, name, None))
            case ast.Attribute(value=value, attr=name):
                return getattr(self._object(value), name)
        raise self._refuse(node)

    def _constant(self, node: ast.expr) -> Any:
        found = self._object(node)
        if isinstance(found, Parameter):
            found = getattr(self._emit.parameters, found.name)
        if isinstance(found, int):
            return WORD(int(found))
        if isinstance(found, float):
            return SINGLE(found)
        raise self._refuse(node)

    def _word(self, value: Any) -> Any:
        return self._builder.zext(value, WORD) if value.type == _TRUTH else value

    def _condition(self, node: ast.expr) -> Any:
        value = self._value(node)
        return value if value.type == _TRUTH else self._builder.icmp_signed("!=", value, WORD(0))

    def _arithmetic(self, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
        kind = type(op)
        if kind not in _ARITHMETIC and kind not in _DIVISIONS:
            raise self._refuse(node)
        left, right = self._word(left), self._word(right)
        known = isinstance(right, ir.Constant)
        if known and isinstance(left, ir.Constant):
            evaluate = _DIVISIONS.get(kind) or _ARITHMETIC[kind][0]
            return WORD(evaluate(left.constant, right.constant))
        if kind in _ARITHMETIC:
            return getattr(self._builder, _ARITHMETIC[kind][1])(left, right)
        divides = kind is ast.FloorDiv
        if known and right.constant > 0 and right.constant & (right.constant - 1) == 0:
            if divides:
                return self._builder.ashr(left, WORD(right.constant.bit_length() - 1))
            return self._builder.and_(left, WORD(right.constant - 1))
        quotient, rest = self._builder.sdiv(left, right), self._builder.srem(left, right)
        # Rounded down, unlike in LLVM: where the rest is not 0 and has another sign than the divisor.
        apart = self._builder.icmp_signed("<", self._builder.xor(rest, right), WORD(0))
        below = self._builder.and_(apart, self._builder.icmp_signed("!=", rest, WORD(0)))
        if divides:
            return self._builder.sub(quotient, self._builder.zext(below, WORD))
        return self._builder.add(rest, self._builder.select(below, right, WORD(0)))

    def _comparison(self, node: ast.Compare, ops: list[ast.cmpop], values: list[Any]) -> Any:
        result = None
        for op, left, right in zip(ops, values[:-1], values[1:], strict=True):
            if type(op) not in _COMPARISONS:
                raise self._refuse(node)
            one = self._builder.icmp_signed(_COMPARISONS[type(op)], self._word(left), self._word(right))
            result = one if result is None else self._builder.and_(result, one)
        return result

    def _connective(self, conjunction: bool, values: list[ast.expr]) -> Any:
        """`and` or `or`: what follows is evaluated only where it decides."""
        first, *others = values
        value = self._condition(first)
        for other in others:
            known, ask = (lambda: _TRUTH(int(not conjunction))), functools.partial(self._condition, other)
            value = self._choice(value, ask, known) if conjunction else self._choice(value, known, ask)
        return value

    def _choice(self, condition: Any, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        then, otherwise, after = self._block("then"), self._block("else"), self._block("after")
        self._builder.cbranch(condition, then, otherwise)
        ends = []
        for block, evaluate in ((then, one), (otherwise, other)):
            self._builder.position_at_end(block)
            ends.append((evaluate(), self._builder.block))
            self._builder.branch(after)
        self._builder.position_at_end(after)
        phi = self._builder.phi(ends[0][0].type)
        for value, block in ends:
            phi.add_incoming(value, block)
        return phi

    def _call(self, node: ast.Call) -> Any:
        called, values = self._object(node.func), [self._value(each) for each in node.args]
        if node.keywords:
            raise self._refuse(node)
        if called in (min, max):
            return functools.reduce(functools.partial(self._extreme, "<" if called is min else ">"), values)
        if isinstance(called, Inline):
            return called.emit(self._emit, *values)
        if isinstance(called, Native | Routine):
            values = [self._word(value) for value in values]
            kinds = called.kinds if isinstance(called, Routine) else [value.type for value in values]
            return self._builder.call(self._emit.program.function(called, *kinds), values)
        raise self._refuse(node)

    def _extreme(self, sign: str, one: Any, other: Any) -> Any:
        return self._builder.select(self._builder.icmp_signed(sign, one, other), one, other)
