"""Reads the defaults of sampling parameters that a checkpoint's generation_config.json has."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from jaxserve.config.plain_params import GENERATION_CONFIG
from jaxserve.config.settings import EngineConfig
from jaxserve.models.loading.json_files import read_object
from jaxserve.sampling_params import SAMPLING_FIELDS

FILE = "generation_config.json"


def sampling_defaults(config: EngineConfig) -> dict[str, int | float]:
    """Returns the parameters, by our names, for which the checkpoint has a default other than ours.

    As in vLLM, `do_sample` does not count: what is not asked for is drawn, unless the temperature is 0.

    Raises ValueError, one line, for a file that cannot be read or a value that is not allowed.
    """
    setting = config.generation_config
    directory = config.model if setting == "auto" else setting
    if setting == "vllm" or directory is None:
        return {}
    path = pathlib.Path(directory) / FILE
    if setting == "auto" and not path.is_file():
        return {}
    content = read_object(path)
    found = {}
    for key, name in GENERATION_CONFIG.items():
        value, row = content.get(key), SAMPLING_FIELDS.get(name)
        if value is None or row is None:
            continue
        try:
            value = row.checked(value)
        except ValueError as error:
            raise ValueError(
                f"model file {path} cannot be used for defaults of sampling parameters: {error}; correct it, or set "
                "EngineConfig.generation_config to 'vllm', which takes none from it"
            ) from error
        if value != row.default:
            found[name] = value
    return found


def defaults_line(defaults: Mapping[str, int | float]) -> str:
    """Returns the line of the log about the defaults of a checkpoint."""
    values = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
    return (
        f"defaults of sampling parameters from {FILE}: {values}; EngineConfig.generation_config='vllm' turns them off"
    )
