"""Limits of what clients may hold open: values that make no sense are refused by name."""

import dataclasses
import pathlib

import pytest

from jaxserve.config import gin_config
from jaxserve.config.client_limits import LimitsConfig


def test_limits_are_part_of_the_servers_configuration(tmp_path):
    path = tmp_path / "my.gin"
    path.write_text("include 'tiny.gin'\nLimitsConfig.max_open_calls = 10\n")
    limits = gin_config.load(str(path), ["LimitsConfig.max_unread_seconds=5"])[0].limits
    assert limits == dataclasses.replace(LimitsConfig(), max_open_calls=10, max_unread_seconds=5.0)
    with pytest.raises(gin_config.ConfigError, match=r"did you mean LimitsConfig\.max_open_calls\?"):
        gin_config.load("tiny.gin", ["LimitsConfig.max_open_cals=10"])
    with pytest.raises(gin_config.ConfigError, match="max_connections is 3; it must be at least 8"):
        gin_config.load("tiny.gin", ["LimitsConfig.max_connections=3"])


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LimitsConfig)])
def test_a_limit_that_bounds_nothing_is_refused(field):
    for value in (0, -1):
        with pytest.raises(ValueError, match=rf"^{field} is {value}; it must be "):
            LimitsConfig(**{field: value})
    with pytest.raises(ValueError, match=rf"^{field} is 'x'; it must be a"):
        LimitsConfig(**{field: "x"})
    if field.endswith("_seconds"):
        for value in (float("nan"), float("inf"), 1e6):
            with pytest.raises(ValueError, match=rf"^{field} is .*; it must be from 0.1 to 86400 seconds"):
                LimitsConfig(**{field: value})


def test_every_limit_has_a_line_on_the_settings_page():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `LimitsConfig.")]
    for field in dataclasses.fields(LimitsConfig):
        assert any(f"{field.name}`" in row for row in rows), field.name
