"""QuantConv1D: GPT-2's Conv1D (a Linear with its weight transposed), packed."""

from __future__ import annotations

from torch import Tensor, nn

from bitfold.nn.linear import QuantLinear


class QuantConv1D(QuantLinear):
    """Takes the place of `transformers.pytorch_utils.Conv1D`, whose float weight is `[in, out]`.

    The packed matrix is the transpose, `[out, in]`, so that it is an ordinary QuantLinear with the two
    names that code around Conv1D reads, `nf` (outputs) and `nx` (inputs). transformers is not imported.
    """

    kind = "conv1d"

    @property
    def nf(self) -> int:
        """Outputs."""
        return self.out_features

    @property
    def nx(self) -> int:
        """Inputs."""
        return self.in_features

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Whether `module` is a Conv1D."""
        return is_conv1d(module)

    @staticmethod
    def _matrix(module: nn.Module) -> Tensor:
        return module.weight.t()  # type: ignore[operator]


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is exactly transformers' Conv1D, told by its name so that nothing is imported."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
