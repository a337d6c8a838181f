"""Random protobuf messages of any service that a server describes by reflection: valid, invalid, and bytes."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

_TEXTS = (
    "",
    "a",
    "copy: abc\n",
    "\0",
    "é🍏",
    "\n\r\x1b[31m",
    "x" * 300,
    "a b c " * 60,
    "lookup: a=1 b=2 ? a",
    "\u202e\ufffd",
)
_WHOLE = (0, 1, 2, 5, 8, -1, 127, 128, 511, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63), 2**32)
_REAL = (0.0, 1.0, 0.5, -0.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
_SHORT_ANSWERS = {"max_tokens": 8, "max_new_tokens": 8}
"""Fields that are small in most messages, or a run would be spent on generating."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of a service. request: makes empty messages."""

    path: str
    request: Any


async def methods_of(address: str) -> list[Method]:
    """Returns every method of every service that the server's reflection lists."""
    pool = descriptor_pool.DescriptorPool()
    found: list[Method] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def ask(**question: str) -> Any:
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)]))
            return await call.read()

        names = [one.name for one in (await ask(list_services="")).list_services_response.service]
        files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
        for name in names:
            for data in (await ask(file_containing_symbol=name)).file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(data)
                files[file.name] = file
        while missing := {one for file in files.values() for one in file.dependency} - files.keys():
            for name in missing:
                for data in (await ask(file_by_filename=name)).file_descriptor_response.file_descriptor_proto:
                    file = descriptor_pb2.FileDescriptorProto.FromString(data)
                    files[file.name] = file
        added: set[str] = set()
        while len(added) < len(files):
            for file in files.values():
                if file.name not in added and set(file.dependency) <= added:
                    pool.Add(file)  # pyright: ignore[reportAttributeAccessIssue]
                    added.add(file.name)
        for name in names:
            found += [
                Method(f"/{name}/{method.name}", message_factory.GetMessageClass(method.input_type))
                for method in pool.FindServiceByName(name).methods
            ]
    return found


class RandomMessages:
    """Makes random requests. seed: of all of them."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def request(self, method: Method) -> tuple[str, bytes]:
        """Returns the kind of a random request and its bytes."""
        draw = self._random.random()
        if draw < 0.5:
            return "message", self.message(method)
        if draw < 0.85:
            return "mutated", self.mutated(self.message(method))
        return "bytes", self._random.randbytes(self._random.choice((0, 1, 3, 20, 200, 5_000, 70_000)))

    def message(self, method: Method) -> bytes:
        """Returns a message of random fields."""
        made = method.request()
        self._fill(made, 0)
        return made.SerializeToString()

    def mutated(self, data: bytes) -> bytes:
        """Returns a message with bytes changed, removed or repeated."""
        found = bytearray(data or b"\x0a\x00")
        for _ in range(self._random.randint(1, 4)):
            place = self._random.randrange(len(found)) if found else 0
            match self._random.randrange(5):
                case 0 if found:
                    found[place] = self._random.randrange(256)
                case 1:
                    del found[place:]
                case 2:
                    found[place:place] = self._random.randbytes(self._random.randint(1, 8))
                case 3:
                    found += found[place:]
                case _:
                    del found[place : place + 3]
        return bytes(found[:1_000_000])

    def _fill(self, made: Any, depth: int) -> None:
        for field in made.DESCRIPTOR.fields:
            if self._random.random() < (0.5 if depth < 3 else 0.9):
                continue
            self._set(made, field, depth)
        for name, most in _SHORT_ANSWERS.items():
            if name in made.DESCRIPTOR.fields_by_name and self._random.random() < 0.8:
                setattr(made, name, self._random.randint(1, most))

    def _set(self, made: Any, field: FieldDescriptor, depth: int) -> None:
        entry = field.message_type is not None and field.message_type.GetOptions().map_entry
        if entry:
            return
        if field.is_repeated:
            count = self._random.choice((0, 1, 1, 2, 5, 17, 1000 if field.message_type is None else 3))
            values = getattr(made, field.name)
            for _ in range(count):
                if field.message_type is not None:
                    self._fill(values.add(), depth + 1)
                else:
                    values.append(self._value(field))
        elif field.message_type is not None:
            part = getattr(made, field.name)
            part.SetInParent()
            self._fill(part, depth + 1)
        else:
            setattr(made, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        draw = self._random
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return draw.randbytes(draw.choice((0, 1, 20, 1000)))
            case FieldDescriptor.CPPTYPE_STRING:
                return draw.choice(_TEXTS)
            case FieldDescriptor.CPPTYPE_BOOL:
                return draw.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return draw.choice(_REAL) if draw.random() < 0.5 else draw.random()
            case FieldDescriptor.CPPTYPE_ENUM:
                return draw.choice((0, 1, 2, 3, 77))
        bits = 32 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
        signed = field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
        value = draw.choice(_WHOLE) if draw.random() < 0.4 else draw.randrange(300)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return min(max(value, low), high)
