"""Records what compressed-tensors dequantizes tensors of test checkpoints to.

python -m tests.models.make_quantized_references
Needs the packages torch and compressed-tensors, which no test needs.
"""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from tests.models.quantized_checkpoints import FORMATS, example

RECORDED = pathlib.Path(__file__).parent / "quantized_references.npz"

NAMES = ("ct_fp8_tensor", "ct_fp8_channel", "ct_int8", "ct_int4", "ct_int4_zeros")
"""Formats that the library still reads; it dropped the index of act order."""


def dequantized(name: str) -> np.ndarray:
    """The library's weights, float32 [N, K]; it computes them in the dtype of the scales."""
    torch = importlib.import_module("torch")
    compressors = importlib.import_module("compressed_tensors.compressors")
    quantization = importlib.import_module("compressed_tensors.quantization")

    def tensor(array: np.ndarray) -> Any:
        kinds = {
            ml_dtypes.bfloat16: (np.int16, torch.bfloat16),
            ml_dtypes.float8_e4m3fn: (np.uint8, torch.float8_e4m3fn),
        }
        for kind, (bits, same) in kinds.items():
            if array.dtype == kind:
                return torch.from_numpy(array.view(bits)).view(same)
        return torch.from_numpy(array)

    form = FORMATS[name]
    group = form.config["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=group["weights"])
    state = {part: tensor(array) for part, array in example(name)[0].items()}
    compressor = compressors.BaseCompressor.get_value_from_registry(form.config["format"])
    return compressor.decompress(state, scheme)["weight"].float().numpy()


if __name__ == "__main__":
    found = {name: dequantized(name) for name in NAMES}
    np.savez_compressed(RECORDED, **found)  # type: ignore[arg-type]
