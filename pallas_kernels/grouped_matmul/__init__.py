"""Products of rows and matrices where each row has a matrix of its own among several: the experts of a model."""

from jaxserve.pallas_kernels.grouped_matmul.api import FORMS, IMPLEMENTATIONS, choose, grouped_matmul, prepare

__all__ = ["FORMS", "IMPLEMENTATIONS", "choose", "grouped_matmul", "prepare"]
