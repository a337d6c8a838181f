"""Reads gin files and `--gin.BINDING=VALUE` overrides into the frozen configs. The one file that touches gin.

A file binds fields of the configs, one a line: `SchedulerConfig.max_num_seqs = 64`. The right side is a Python literal
or a macro (`%NAME`, defined by `NAME = VALUE`). `include "other.gin"` reads another file first. The configs nest by
themselves (a ServerConfig finds its EngineConfig), so references (`@NAME`) and scopes (`a/NAME`) are not needed and are
refused, as are imports: a configuration file never runs code. Nothing is ignored: an unknown file, name or value is
a `ConfigError` whose text is one line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import pathlib
import re
import sys
import threading
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import gin
from gin import config_parser

from jaxserve.config import field_types
from jaxserve.config.settings import ServerConfig

T = TypeVar("T")

CONFIG_DIRECTORY = pathlib.Path(__file__).resolve().parents[1] / "configs"
"""Directory of the shipped files: inside the package, in a checkout by way of a symbolic link."""


class ConfigError(ValueError):
    """Signals a configuration that cannot be used; the text is one line that names where, what and the nearest
    remedy."""


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str


@dataclasses.dataclass(frozen=True)
class _Reference:
    name: str


class _Delegate(config_parser.ParserDelegate):
    """Keeps macros and references as marks, to be resolved when everything has been read."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        return _Reference(scoped_configurable_name)

    def macro(self, macro_name: str) -> Any:
        return _Macro(macro_name)


@dataclasses.dataclass(frozen=True)
class _Binding:
    config: type
    field: str
    value: Any
    where: str


def find_file(name: str, beside: pathlib.Path | None = None) -> pathlib.Path:
    """Finds a path as given (or beside the including file), else under configs/, where `.gin` may be left out."""
    places = [pathlib.Path(name), CONFIG_DIRECTORY / name, CONFIG_DIRECTORY / f"{name}.gin"]
    if beside is not None:
        places.insert(0, beside / name)
    for place in places:
        if place.is_file():
            return place
    shipped = sorted(path.relative_to(CONFIG_DIRECTORY).as_posix() for path in CONFIG_DIRECTORY.rglob("*.gin"))
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"configs/ has {', '.join(shipped) or 'none'}"
    raise ConfigError(f"configuration file {name!r} does not exist, neither as a path nor under configs/; {hint}")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits command line arguments into the bindings of every `--gin.BINDING=VALUE` and all others, in order."""
    overrides: list[str] = []
    others: list[str] = []
    for argument in arguments:
        if argument.startswith(("--gin.", "--gin=")) or argument == "--gin":
            if not re.match(r"--gin\.[^=]+=", argument):
                raise ConfigError(f"{argument} is not complete; write --gin.BINDING=VALUE, without spaces around '='")
            overrides.append(argument.removeprefix("--gin."))
        else:
            others.append(argument)
    return overrides, others


class _Reader:
    """Collects bindings and macros from files and overrides; later ones replace earlier ones."""

    def __init__(self, configs: Sequence[type]):
        self._configs = configs
        self._macros: dict[str, tuple[Any, str]] = {}
        self._bindings: dict[tuple[type, str], _Binding] = {}
        self._open_files: list[pathlib.Path] = []

    def read_file(self, path: pathlib.Path) -> None:
        if path.resolve() in self._open_files:
            raise ConfigError(f"configuration file {str(path)!r} includes itself")
        self._open_files.append(path.resolve())
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"configuration file {str(path)!r} cannot be read: {error}") from error
        with _one_line_syntax_errors(path.name):
            for statement in config_parser.ConfigParser(text, _Delegate()):
                self._add_statement(statement, path)
        self._open_files.pop()

    def _add_statement(self, statement: Any, path: pathlib.Path) -> None:
        where = f"{path.name}:{statement.location.line_num}"
        match statement:
            case config_parser.BindingStatement(scope=scope, selector=selector, arg_name=field, value=value):
                self._add(f"{scope}/" if scope else "", selector, field, value, where)
            case config_parser.BlockDeclaration(selector=selector):
                self._config_named(selector, "", where)
            case config_parser.IncludeStatement(filename=name):
                self.read_file(find_file(name, beside=path.parent))
            case _:
                raise ConfigError(f"{where}: a configuration file cannot import code; remove the import")

    def read_override(self, override: str) -> None:
        """Adds `BINDING=VALUE`; a value that is no literal is taken as text where the field takes text."""
        where = f"--gin.{override}"
        key, _, text = override.partition("=")
        key, text = key.strip(), text.strip()
        selector, _, field = key.rpartition(".")
        if not selector:
            selector, field = key, ""
        try:
            with _one_line_syntax_errors(where):
                value = _parse_literal(text)
        except ConfigError:
            if not field:
                raise
            config = self._config_named(selector, field, where)
            hint = field_types.hints(config).get(field)
            if hint is None or text[:1] in ("'", '"', "@", "%", "") or not field_types.accepts(hint, text):
                self._check_field(config, field, where)
                raise ConfigError(
                    f"{where}: {field} is {text!r}, which cannot be read; it must be {field_types.describe(hint)}"
                ) from None
            value = text
        scope, _, selector = selector.rpartition("/")
        self._add(f"{scope}/" if scope else "", selector, field, value, where)

    def _add(self, scope: str, selector: str, field: str, value: Any, where: str) -> None:
        if scope:
            raise ConfigError(f"{where}: scopes are not supported; write {selector}{'.' if field else ''}{field}")
        if not field:
            self._macros[selector] = (value, where)
            return
        config = self._config_named(selector, field, where)
        self._check_field(config, field, where)
        self._bindings[config, field] = _Binding(config, field, value, where)

    def _config_named(self, selector: str, field: str, where: str) -> type:
        for config in self._configs:
            if f".{_name(config)}".endswith(f".{selector}"):
                return config
        names = [config.__name__ for config in self._configs]
        near = difflib.get_close_matches(selector, names, n=1) or [
            config.__name__ for config in self._configs if field in field_types.hints(config)
        ]
        hint = f"did you mean {near[0]}{'.' if field else ''}{field}?" if near else f"known are {', '.join(names)}"
        raise ConfigError(f"{where}: there is no configuration {selector!r}; {hint}")

    def _check_field(self, config: type, field: str, where: str) -> None:
        fields = field_types.hints(config)
        if field in fields:
            return
        owners = [f"{other.__name__}.{field}" for other in self._configs if field in field_types.hints(other)]
        near = [f"{config.__name__}.{name}" for name in difflib.get_close_matches(field, fields, n=1)]
        hint = _did_you_mean(owners or near or self._near_bindings(field))
        raise ConfigError(f"{where}: {config.__name__} has no field {field!r}; {hint or 'it has ' + ', '.join(fields)}")

    def _near_bindings(self, name: str) -> list[str]:
        owners = {field: config.__name__ for config in self._configs for field in field_types.hints(config)}
        return [f"{owners[field]}.{field}" for field in difflib.get_close_matches(name, owners, n=1)]

    def bindings(self) -> list[_Binding]:
        """Every binding with macros put in and types checked; a macro that no binding uses is an error."""
        used: set[str] = set()
        resolved = []
        for binding in self._bindings.values():
            name, where = f"{binding.config.__name__}.{binding.field}", binding.where
            value = self._resolve(binding.value, where, used, ())
            hint = field_types.hints(binding.config)[binding.field]
            inner, _ = _inner_config(hint)
            if inner is not None and value is not None:
                raise ConfigError(
                    f"{where}: {name} is set through its own fields; write {inner.__name__}.FIELD = VALUE"
                )
            try:
                value = field_types.convert(hint, value)
            except TypeError:
                expected = field_types.describe(hint)
                raise ConfigError(f"{where}: {name} is {value!r}; it must be {expected}") from None
            resolved.append(dataclasses.replace(binding, value=value))
        for name, (_, where) in self._macros.items():
            if name not in used:
                hint = _did_you_mean(self._near_bindings(name)) or f"if it is a macro, use it as %{name}"
                raise ConfigError(f"{where}: {name!r} is bound but never used; {hint}")
        return resolved

    def _resolve(self, value: Any, where: str, used: set[str], within: tuple[str, ...]) -> Any:
        match value:
            case _Reference(name):
                raise ConfigError(f"{where}: @{name}: references are not supported; configurations nest by themselves")
            case _Macro(name):
                if name not in self._macros:
                    hint = _did_you_mean([f"%{near}" for near in difflib.get_close_matches(name, self._macros, n=1)])
                    raise ConfigError(f"{where}: macro %{name} is not defined; {hint or f'write {name} = VALUE'}")
                if name in within:
                    raise ConfigError(f"{where}: macro %{name} is defined by itself")
                used.add(name)
                return self._resolve(self._macros[name][0], where, used, (*within, name))
            case list() | tuple():
                return type(value)(self._resolve(item, where, used, within) for item in value)
            case dict():
                return {key: self._resolve(item, where, used, within) for key, item in value.items()}
            case _:
                return value


def _did_you_mean(names: Sequence[str]) -> str:
    return f"did you mean {names[0]}?" if names else ""


def _parse_literal(text: str) -> Any:
    parser = config_parser.ConfigParser(text, _Delegate())
    value = parser.parse_value()
    token: Any = parser.current_token
    if token.type not in (tokenize.NEWLINE, tokenize.ENDMARKER):
        raise SyntaxError("Expected one value.")
    return value


@contextlib.contextmanager
def _one_line_syntax_errors(where: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except SyntaxError as error:
        reason, _, rest = (error.msg or "").partition("\n")
        if "parse token" in rest or "parse value" in reason:
            reason = "a value is a number, True, False, None, text in quotes, or a tuple, list or dict of these"
        raise ConfigError(_unreadable(where, error.lineno, reason, error.text)) from error
    except tokenize.TokenError as error:
        reason, (line, _) = error.args
        raise ConfigError(_unreadable(where, line, reason, None)) from error


def _unreadable(where: str, line: int | None, reason: str, text: str | None) -> str:
    line_part = f":{line}" if line and not where.startswith("--") else ""
    text_part = f": {text.strip()}" if text and text.strip() else ""
    return f"{where}{line_part}: cannot be read: {reason.rstrip('.')}{text_part}"


# gin's bindings are global to the process: one load at a time, cleared before and after.
_gin_lock = threading.Lock()


def build(root: type[T], name: str, overrides: Sequence[str] = ()) -> tuple[T, str]:
    """Reads file `name`, then the overrides, and returns an instance of root and the operative configuration as text.

    name: several files, separated by commas, are read in turn; later ones win over earlier ones.
    root: a frozen dataclass. A field that is annotated with another dataclass is constructed in turn from that one's
        bindings; if it may be None, only when something of it is bound and it is not itself bound to None.
    overrides: `BINDING=VALUE`, as `split_overrides` returns them; they win over the file, later over earlier.
    Raises ConfigError, always one line.
    """
    reader = _Reader(_family(root))
    paths = [find_file(part.strip()) for part in ([name] if pathlib.Path(name).is_file() else name.split(","))]
    for path in paths:
        reader.read_file(path)
    for override in overrides:
        reader.read_override(override)
    bindings = reader.bindings()
    with _gin_lock:
        gin.clear_config()
        try:
            for binding in bindings:
                gin.bind_parameter(f"{_selector(binding.config)}.{binding.field}", binding.value)
            built = _Builder(", ".join(path.name for path in paths), bindings).construct(root)
            return built, gin.operative_config_str(max_line_length=120)
        finally:
            gin.clear_config()


def load(name: str, overrides: Sequence[str] = ()) -> tuple[ServerConfig, str]:
    """Returns the server's configuration (which contains the engine's) and its operative text; see `build`.

    A relative model or tokenizer path that is not found from the working directory is looked for beside the package,
    where a checkout and an installed copy keep the shipped model.
    """
    server, operative = build(ServerConfig, name, overrides)
    engine = server.engine
    engine = dataclasses.replace(engine, model=_shipped(engine.model), tokenizer=_shipped(engine.tokenizer))
    return dataclasses.replace(server, engine=engine), operative


def load_from_command_line(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, ServerConfig, str]:
    """Adds `--config NAME` to the parser, takes every `--gin.BINDING=VALUE` out of the arguments and loads.

    arguments: without the program's name; None takes those of the command line.
    Returns the parsed arguments, the configuration and its operative text. A faulty one prints one line on stderr and
    ends the process with exit code 2, as argparse does for a faulty argument.
    """
    parser.add_argument(
        "--config",
        default="tiny.gin",
        metavar="NAME[,NAME...]",
        help="gin files, by path or name under configs/; later ones win over earlier ones",
    )
    parser.epilog = "--gin.BINDING=VALUE, repeated, overrides the file: --gin.SchedulerConfig.max_num_seqs=8"
    try:
        overrides, others = split_overrides(sys.argv[1:] if arguments is None else arguments)
        parsed = parser.parse_args(others)
        server, operative = load(parsed.config, overrides)
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return parsed, server, operative


def _shipped(path: str | None) -> str | None:
    if path is None or pathlib.Path(path).exists():
        return path
    beside = CONFIG_DIRECTORY.parent / path
    return str(beside) if beside.exists() else path


class _Builder:
    """Constructs configs through gin, so that its operative configuration knows every field that was used."""

    def __init__(self, file_name: str, bindings: Sequence[_Binding]):
        self._file_name = file_name
        self._bindings = bindings

    def construct(self, config: type[T]) -> T:
        mine = [binding for binding in self._bindings if binding.config is config]
        bound = {binding.field for binding in mine}
        arguments: dict[str, Any] = {}
        missing = []
        for field in dataclasses.fields(typing.cast(Any, config)):
            inner, optional = _inner_config(field_types.hints(config).get(field.name))
            if inner is not None and field.name not in bound and (not optional or self._is_bound(inner)):
                arguments[field.name] = self.construct(inner)
            elif field.name not in bound and field.init and not _has_default(field):
                missing.append(field.name)
        if missing:
            raise ConfigError(f"{self._file_name}: {config.__name__} needs {', '.join(missing)}; nothing binds it")
        try:
            return gin.get_configurable(_selector(config))(**arguments)
        except (ValueError, TypeError) as error:
            text = str(error).partition("\n")[0]  # gin adds lines on where the call stood
            places = {binding.field: binding.where for binding in mine}
            named = [places[word] for word in re.findall(r"\w+", text) if word in places]
            raise ConfigError(f"{named[0] if named else self._file_name}: {text}") from error

    def _is_bound(self, config: type) -> bool:
        family = _family(config)
        return any(binding.config in family for binding in self._bindings)


def _family(config: type) -> list[type]:
    """Returns the dataclass and, recursively, those that its fields name."""
    inner = [_inner_config(hint)[0] for hint in field_types.hints(config).values()]
    return [config, *(member for nested in inner if nested is not None for member in _family(nested))]


def _inner_config(hint: Any) -> tuple[type | None, bool]:
    """Returns the dataclass that a field's type names, and whether the field may be None instead."""
    arguments = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    for choice in (hint, *arguments):
        if isinstance(choice, type) and dataclasses.is_dataclass(choice):
            return choice, type(None) in arguments
    return None, False


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@functools.cache  # gin refuses a second registration
def _selector(config: type) -> str:
    name = _name(config)
    gin.external_configurable(config, module=name.rpartition(".")[0])
    return name


def _name(config: type) -> str:
    """Returns the full name of a class in bindings. Of jaxserve.config it has the package, and not the file in it."""
    module = "jaxserve.config" if config.__module__.startswith("jaxserve.config.") else config.__module__
    return f"{module}.{config.__name__}"
