"""The arithmetic of benchmarks/cpu_roofline.py."""

import json
import math
import pathlib

from benchmarks import cpu_roofline
from benchmarks.work import SHAPES
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import parameters

PROGRAM = """HloModule jit_forward_8

%fused_dot (p0: bf16[8,4], p1: bf16[4,4]) -> f32[8,4] {
  %p0 = bf16[8,4]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}
}

ENTRY %main (x: bf16[8,4]) -> f32[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %ynn_fusion = f32[8,4]{1,0} fusion(%x, %x), kind=kCustom, calls=%fused_dot
  %ffi_call.3 = f32[8,4]{1,0} custom-call(%x), custom_call_target="jaxserve_linear_1", metadata={op_name="attend"}
  %ffi_call.4 = bf16[8,4]{1,0} custom-call(%x), custom_call_target="jaxserve_paged_attention_attend_1"
  ROOT %add_fusion = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%other
}
"""


def test_operations_are_told_apart_by_what_they_call() -> None:
    assert cpu_roofline.parts_of_instructions(PROGRAM, "forward") == {
        "ynn_fusion": "products",
        "ffi_call.3": "products",
        "ffi_call.4": "attention",
        "add_fusion": "other",
    }


def test_products_of_the_sample_program_are_the_head() -> None:
    parts = cpu_roofline.parts_of_instructions(PROGRAM, "sample")
    assert parts["ffi_call.3"] == "head"
    assert parts["add_fusion"] == "sampling"


def test_a_step_reads_the_matrices_once_and_each_position(tmp_path: pathlib.Path) -> None:
    shape = SHAPES["153m"]
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    config = ModelConfig.from_directory(tmp_path)
    tensors = {source.tensor: source.shape for each in parameters(config).values() for source in each.sources}
    matrices = sum(
        math.prod(size) for name, size in tensors.items() if len(size) == 2 and name != "model.embed_tokens.weight"
    )
    read, operations = cpu_roofline.needs(shape, rows=3, context=100)
    assert operations == 2 * matrices * 3
    assert read == 2 * matrices + 3 * 100 * config.num_hidden_layers * 2 * config.num_key_value_heads * 64 * 2
