"""How calibration runs, apart from what the method itself can be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Settings of the calibrated way of `bitfold.quantize`.

    Args:
        batch_size: sequences per batch that is made of texts and of single sequences of ids. Batches given
            as such are used as they are.
        sequence_length: tokens at which texts are cut; None takes 512, or what the model allows if less.
        pack: join all texts, so that every sequence is full; False cuts each text on its own and pads.
        true_sequential: quantize the matrices of a block in the order in which they run, each set on what
            the already folded ones before it feed; False gathers for a whole block at once (faster).
        float_stream: also run the float model beside the folded one, so that what earlier layers did to an
            input can be made good (twice the activations in memory, about twice the forward passes). None
            leaves it to the method: `gptq` and `learned` do.
        expert_floor: an expert that fewer tokens reached is folded without calibration (`search`).
        expert_prior: an expert that few tokens reached (fewer than four per input) takes this many tokens'
            worth of the mean over all experts of its role; None takes as many as it has inputs.
        max_memory: bytes that the run may add to what the process holds; None takes what is available.
        seed: methods that draw random numbers draw the same ones each time.
    """

    batch_size: int = 8
    sequence_length: int | None = None
    pack: bool = False
    true_sequential: bool = True
    float_stream: bool | None = None
    expert_floor: int = 32
    expert_prior: int | None = None
    max_memory: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {
            "batch_size": 1,
            "sequence_length": 2,
            "expert_floor": 0,
            "expert_prior": 0,
            "max_memory": 1,
        }
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                msg = f"Settings: {name} must be at least {low}, got {value}"
                raise ValueError(msg)
