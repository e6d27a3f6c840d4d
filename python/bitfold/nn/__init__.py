"""Modules that hold packed weights and compute with them."""

from bitfold.nn._base import PackedModule
from bitfold.nn.accuracy import set_accuracy
from bitfold.nn.conv1d import QuantConv1D
from bitfold.nn.embedding import QuantEmbedding
from bitfold.nn.layout import set_layout
from bitfold.nn.linear import QuantLinear
from bitfold.nn.mixed import set_llm_int8
from bitfold.nn.tied import TiedEmbedding, TiedHead

__all__ = [
    "PackedModule",
    "QuantConv1D",
    "QuantEmbedding",
    "QuantLinear",
    "TiedEmbedding",
    "TiedHead",
    "set_accuracy",
    "set_layout",
    "set_llm_int8",
]
