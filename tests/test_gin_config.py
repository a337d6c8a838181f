"""Configuration files and overrides: what they give, what wins, and one clear line for everything that is wrong."""

import argparse
import dataclasses
import pathlib
import threading
from typing import Literal

import gin
import pytest

from jaxserve.config import field_types, gin_config
from jaxserve.config.changed import changed_settings
from jaxserve.config.gin_config import ConfigError
from jaxserve.config.settings import EngineConfig, ServerConfig
from jaxserve.models.config import ModelConfig, RopeScaling


@pytest.fixture
def load(tmp_path):
    """Loads a file of the given text with the given overrides and returns the server's configuration."""

    def load_text(text: str, *overrides: str) -> ServerConfig:
        path = tmp_path / "my.gin"
        path.write_text("EngineConfig.model = 'somewhere'\n" + text)
        return gin_config.load(str(path), overrides)[0]

    return load_text


def test_file_sets_nested_fields_and_leaves_defaults(load):
    server = load("SchedulerConfig.max_num_seqs = 3\nServerConfig:\n  port = 0\n  drain_seconds = 2\n")
    assert server.engine.scheduler.max_num_seqs == 3
    assert server.engine.cache == EngineConfig(model="x").cache
    assert server.engine.architecture is None
    assert server.port == 0
    assert server.drain_seconds == 2.0
    assert type(server.drain_seconds) is float


def test_override_wins_over_file_and_later_over_earlier(load):
    server = load("ServerConfig.port = 1\n", "ServerConfig.port=2", "ServerConfig.port=3")
    assert server.port == 3


def test_macros_are_resolved_last_so_that_an_override_reaches_every_use(load):
    server = load("LIMIT = 8\nSchedulerConfig.max_num_seqs = %LIMIT\nEngineConfig.row_buckets = [%LIMIT]\n", "LIMIT=16")
    assert server.engine.scheduler.max_num_seqs == 16
    assert server.engine.row_buckets == (16,)


def test_include_is_found_beside_the_file_and_under_configs(load, tmp_path):
    (tmp_path / "base.gin").write_text("ServerConfig.port = 7\nEngineConfig.seed = 1\n")
    server = load("include 'base.gin'\ninclude 'tiny.gin'\nEngineConfig.seed = 2\n")
    assert (server.port, server.engine.seed) == (7, 2)
    assert server.engine.cache.num_pages == 2049


def test_later_files_of_a_list_win_over_earlier_ones(tmp_path):
    for name, seed in (("one.gin", 1), ("two.gin", 2)):
        (tmp_path / name).write_text(f"EngineConfig.seed = {seed}\nServerConfig.served_model_name = {name!r}\n")
    (tmp_path / "a,b.gin").write_text("EngineConfig.model = 'm'\nEngineConfig.seed = 3\n")
    server, _ = gin_config.load(f"tiny.gin,{tmp_path / 'one.gin'}, {tmp_path / 'two.gin'}")
    assert (server.engine.seed, server.served_model_name, server.engine.cache.num_pages) == (2, "two.gin", 2049)
    assert gin_config.load(str(tmp_path / "a,b.gin"))[0].engine.seed == 3  # a file whose own name has a comma


PRESETS = {"interactive": (32, 512, 0.19), "balanced": (128, 2048, 0.5), "throughput": (256, 8192, 0.7)}


def test_every_preset_is_known_here():
    assert {path.stem for path in (gin_config.CONFIG_DIRECTORY / "presets").glob("*.gin")} == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("base", ["tiny.gin", "llama.gin"])
def test_preset_over_a_model(tmp_path, base, preset):
    path = tmp_path / "mine.gin"
    path.write_text(f"include '{base}'\ninclude 'presets/{preset}.gin'\n")
    included, listed, plain = (
        gin_config.load(name)[0].engine for name in (str(path), f"{base},presets/{preset}.gin", base)
    )
    assert included == listed
    scheduler = listed.scheduler
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens, scheduler.admission.prefill_share) == (
        PRESETS[preset]
    )
    assert (listed.model, listed.architecture, listed.cache.page_size) == (
        plain.model,
        plain.architecture,
        plain.cache.page_size,
    )
    if preset == "interactive":
        assert (scheduler.ordering.ttft_target, scheduler.batching.max_wait_seconds) == (0.1, 0.01)
    assert listed.cache.gpu_memory_utilization == (0.95 if preset == "throughput" else 0.92)


@pytest.mark.parametrize("value", ["/data/my model", "'/data/my model'", '"/data/my model"'])
def test_text_on_the_command_line_needs_no_quotes(load, value):
    assert load("", f"EngineConfig.model={value}").engine.model == "/data/my model"


def test_binding_may_name_the_module(load):
    assert load("jaxserve.config.ServerConfig.port = 9").port == 9
    assert load("", "config.ServerConfig.port=9").port == 9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ServerConfg.port = 1", "my.gin:2: there is no configuration 'ServerConfg'; did you mean ServerConfig.port?"),
        ("Zzz.port = 1", "my.gin:2: there is no configuration 'Zzz'; did you mean ServerConfig.port?"),
        ("Zzz.zzz = 1", "my.gin:2: there is no configuration 'Zzz'; known are ServerConfig, EngineConfig, ModelConfig"),
        ("Zzz:\n  port = 1", "my.gin:2: there is no configuration 'Zzz'"),
        ("ServerConfig.prot = 1", "my.gin:2: ServerConfig has no field 'prot'; did you mean ServerConfig.port?"),
        (
            "EngineConfig.max_num_seqs = 1",
            "my.gin:2: EngineConfig has no field 'max_num_seqs'; did you mean SchedulerConfig.max_num_seqs?",
        ),
        ("CacheConfig.zzz = 1", "my.gin:2: CacheConfig has no field 'zzz'; it has page_size, num_pages"),
        ("port = 1", "my.gin:2: 'port' is bound but never used; did you mean ServerConfig.port?"),
        ("QQQ = 1", "my.gin:2: 'QQQ' is bound but never used; if it is a macro, use it as %QQQ"),
        ("ServerConfig.port = %QQQ", "my.gin:2: macro %QQQ is not defined; write QQQ = VALUE"),
        ("A = %A\nServerConfig.port = %A", "my.gin:3: macro %A is defined by itself"),
        ("ServerConfig.port = 'x'", "my.gin:2: ServerConfig.port is 'x'; it must be a whole number"),
        ("ServerConfig.port = True", "my.gin:2: ServerConfig.port is True; it must be a whole number"),
        ("ServerConfig.port = 1.0", "my.gin:2: ServerConfig.port is 1.0; it must be a whole number"),
        ("CacheConfig.num_pages = 'x'", "my.gin:2: CacheConfig.num_pages is 'x'; it must be a whole number or None"),
        ("EngineConfig.dtype = 16", "my.gin:2: EngineConfig.dtype is 16; it must be text in quotes"),
        (
            "EngineConfig.row_buckets = (8, 'x')",
            "my.gin:2: EngineConfig.row_buckets is (8, 'x'); it must be a tuple, each item a whole number or None",
        ),
        ("ServerConfig.port = 70000", "my.gin:2: port is 70000; it must be from 0 to 65535"),
        ("EngineConfig.dtype = 'int8'", "my.gin:2: dtype is 'int8'; it must be one of auto, float32"),
        (
            "SchedulerConfig.max_num_seqs = 1000",
            "my.gin:2: max_num_batched_tokens is 512; it must be at least max_num_seqs 1000",
        ),
        ("ModelConfig.vocab_size = 3", "my.gin: ModelConfig needs architecture, hidden_size"),
        (
            "EngineConfig.scheduler = 3",
            "my.gin:2: EngineConfig.scheduler is set through its own fields; write SchedulerConfig.FIELD = VALUE",
        ),
        ("EngineConfig.scheduler = @SchedulerConfig()", "my.gin:2: @SchedulerConfig: references are not supported"),
        ("a/ServerConfig.port = 3", "my.gin:2: scopes are not supported; write ServerConfig.port"),
        ("import os", "my.gin:2: a configuration file cannot import code"),
        ("from __gin__ import dynamic_registration", "my.gin:2: a configuration file cannot import code"),
        ("include 'my.gin'", "includes itself"),
        (
            "include 'tiyn.gin'",
            "'tiyn.gin' does not exist, neither as a path nor under configs/; did you mean tiny.gin?",
        ),
        (
            "EngineConfig.model = abc",
            "my.gin:2: cannot be read: a value is a number, True, False, None, text in quotes",
        ),
        ("EngineConfig.model = 'abc", "my.gin:2: cannot be read"),
        ("EngineConfig.model = (1,", "cannot be read"),
        ("ServerConfig.port 3", "my.gin:2: cannot be read: Couldn't parse statement, expected ':' or '='"),
        ("$", "my.gin:2: cannot be read: Unexpected token"),
    ],
)
def test_fault_in_a_file_is_one_line(load, line, message):
    with pytest.raises(ConfigError) as caught:
        load(line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ServerConfig.prot=1", "--gin.ServerConfig.prot=1: ServerConfig has no field 'prot'; did you mean"),
        ("ServerConfig.prot=abc", "--gin.ServerConfig.prot=abc: ServerConfig has no field 'prot'; did you mean"),
        ("ServerConfig.port=abc", "port is 'abc', which cannot be read; it must be a whole number"),
        ("ServerConfig.port=1 2", "port is '1 2', which cannot be read; it must be a whole number"),
        ("ServerConfig.port=", "port is '', which cannot be read; it must be a whole number"),
        ("EngineConfig.model='abc", "which cannot be read; it must be text in quotes or None"),
        ("ServerConfig.port=-1", "--gin.ServerConfig.port=-1: port is -1; it must be from 0 to 65535"),
        ("a/ServerConfig.port=1", "scopes are not supported"),
        ("port=1", "'port' is bound but never used; did you mean ServerConfig.port?"),
        ("PORT=abc", "--gin.PORT=abc: cannot be read"),
        ("EngineConfig.seed=%SEED", "macro %SEED is not defined"),
    ],
)
def test_fault_in_an_override_is_one_line(load, override, message):
    with pytest.raises(ConfigError) as caught:
        load("", override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read_as_text_is_one_line(tmp_path):
    (tmp_path / "bad.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bad\.gin' cannot be read"):
        gin_config.load(str(tmp_path / "bad.gin"))


def test_overrides_are_parted_from_other_arguments():
    arguments = ["--config", "a.gin", "--gin.A.b=1", "prompt", "--gin.C.d=x=y", "--verbose"]
    assert gin_config.split_overrides(arguments) == (["A.b=1", "C.d=x=y"], ["--config", "a.gin", "prompt", "--verbose"])


@pytest.mark.parametrize("argument", ["--gin", "--gin.A.b", "--gin=A.b", "--gin.=3"])
def test_incomplete_override_is_refused(argument):
    with pytest.raises(ConfigError, match=r"write --gin\.BINDING=VALUE"):
        gin_config.split_overrides([argument])


def test_command_line_gives_arguments_configuration_and_text():
    parser = argparse.ArgumentParser()
    parser.add_argument("--verbose", action="store_true")
    parsed, server, operative = gin_config.load_from_command_line(
        parser, ["--verbose", "--config", "tiny", "--gin.ServerConfig.port=0"]
    )
    assert parsed.verbose
    assert server.port == 0
    assert "ServerConfig.port = 0" in operative


def test_command_line_fault_is_one_line_and_exit_code_2(capsys):
    parser = argparse.ArgumentParser(prog="jaxserve.server")
    with pytest.raises(SystemExit) as caught:
        gin_config.load_from_command_line(parser, ["--gin.ServerConfig.prot=1"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxserve.server: --gin.ServerConfig.prot=1: ServerConfig has no field 'prot'")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["tiny.gin", "llama.gin"])
def test_operative_text_reads_back_as_the_same_configuration(name, tmp_path):
    server, operative = gin_config.load(name, ["SchedulerConfig.max_num_seqs=32"])
    (tmp_path / "again.gin").write_text(operative)
    again, operative_again = gin_config.load(str(tmp_path / "again.gin"))
    assert again == server
    assert operative_again == operative
    assert "SchedulerConfig.max_num_seqs = 32" in operative
    assert "CacheConfig.gpu_memory_utilization = 0.92" in operative  # a default that was used


def test_tiny_serves_the_shipped_model_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = gin_config.load("tiny.gin")[0].engine
    assert engine.dtype == "float32"
    model = pathlib.Path(engine.model or "")
    assert model.parts[-3:] == ("models", "tiny", "checkpoint")
    if model.exists():
        assert model.is_absolute()


def test_llama_has_the_published_architecture_without_a_checkpoint():
    architecture = gin_config.load("llama.gin")[0].engine.architecture
    assert architecture == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
        dtype="bfloat16",
    )


def test_architecture_can_be_unset_to_read_it_from_the_checkpoint():
    assert gin_config.load("llama.gin", ["EngineConfig.architecture=None"])[0].engine.architecture is None


def test_nothing_stays_in_gin_after_success_or_failure(load):
    for override in ("ServerConfig.port=5", "ServerConfig.port=70000"):
        try:
            load("", override)
        except ConfigError:
            assert "70000" in override
        assert gin.config_str() == ""
        assert gin.operative_config_str() == ""
    assert load("").port == ServerConfig(engine=EngineConfig(model="x")).port


def test_loads_in_several_threads_do_not_mix():
    ports: dict[int, int] = {}

    def run(port: int) -> None:
        ports[port] = gin_config.load("tiny.gin", [f"ServerConfig.port={port}"])[0].port

    threads = [threading.Thread(target=run, args=(port,)) for port in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ports == {port: port for port in range(20)}


@dataclasses.dataclass(frozen=True)
class _Fields:
    mode: Literal["fast", "slow"] = "fast"
    pair: tuple[int, float] = (1, 2.0)
    table: dict[str, int] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("_Fields.mode='slow'", _Fields(mode="slow")),
        ("_Fields.mode=slow", _Fields(mode="slow")),
        ("_Fields.pair=(3, 4)", _Fields(pair=(3, 4.0))),
        ("_Fields.table={'a': 1}", _Fields(table={"a": 1})),
    ],
)
def test_richer_types(tmp_path, binding, expected):
    (tmp_path / "empty.gin").write_text("")
    assert gin_config.build(_Fields, str(tmp_path / "empty.gin"), [binding])[0] == expected


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("_Fields.mode='other'", "_Fields.mode is 'other'; it must be one of 'fast', 'slow'"),
        ("_Fields.pair=(3,)", "_Fields.pair is (3,); it must be a tuple of a whole number, a number"),
        ("_Fields.table={'a': 'b'}", "it must be a dict from text in quotes to a whole number"),
    ],
)
def test_richer_types_refused(tmp_path, binding, message):
    (tmp_path / "empty.gin").write_text("")
    with pytest.raises(ConfigError) as caught:
        gin_config.build(_Fields, str(tmp_path / "empty.gin"), [binding])
    assert message in str(caught.value)


def test_every_field_of_every_configuration_has_a_type_that_can_be_checked():
    for config in gin_config._family(ServerConfig):
        for name, hint in field_types.hints(config).items():
            assert field_types.describe(hint), f"{config.__name__}.{name}"


def test_changed_settings_are_those_that_differ(load):
    assert list(changed_settings(ServerConfig(EngineConfig(model="x")))) == ["EngineConfig.model = 'x'"]
    config = load("ServerConfig.port = 7\nSchedulerConfig.policy = 'fair'\nLimitsConfig.max_open_calls = 8192")
    assert "ServerConfig.port = 7" in changed_settings(config)
    assert "SchedulerConfig.policy = 'fair'" in changed_settings(config)
    assert not any("max_open_calls" in line for line in changed_settings(config))
