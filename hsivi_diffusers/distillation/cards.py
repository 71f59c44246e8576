"""What a run would take on a graphics card that is not here: an estimate from its data sheet."""

from __future__ import annotations

from typing import NamedTuple

from ..runs.options import did_you_mean

COMPUTE, TRAFFIC = 0.4, 0.7  # shares of a data sheet that are assumed to be reached
LAUNCH = 1e-5  # seconds of Python and PyTorch that are assumed for an operation, which a small network waits for


class Card(NamedTuple):
    """Of the data sheet of a card.

    Attributes:
        half: TFLOP/s of dense matrix products in fp16 or bf16 that are summed in float32.
        single: TFLOP/s in float32, without TF32.
        bandwidth: GB/s of its memory.
        memory: In GiB.
        has_bf16: Whether it multiplies in bf16 as fast as in fp16.
    """

    half: float
    single: float
    bandwidth: float
    memory: int
    has_bf16: bool = True

    def seconds(self, work: Work, half: bool) -> float:
        """Estimated duration of some work, in half or single precision."""
        peak = self.half if half else self.single
        busy = work.flops / (COMPUTE * peak * 1e12) + work.traffic / (TRAFFIC * self.bandwidth * 1e9)
        return max(busy, LAUNCH * work.operations)


class Work(NamedTuple):
    """What is to be done.

    Attributes:
        flops: Floating-point operations of matrix products, convolutions and attention.
        traffic: Bytes that all operations read and write.
        operations: Their number.
    """

    flops: float
    traffic: float
    operations: float


# NVIDIA's data sheets, and for GeForce cards its white papers of Ampere GA102, Ada and Blackwell: without sparsity.
# A100, H100 and H200 are those with SXM sockets.
CARDS = {
    "T4": Card(65, 8.1, 320, 16, has_bf16=False),
    "L4": Card(121, 30.3, 300, 24),
    "A10": Card(125, 31.2, 600, 24),
    "L40S": Card(362, 91.6, 864, 48),
    "RTX 3090": Card(71, 35.6, 936, 24),
    "RTX 4090": Card(165.2, 82.6, 1008, 24),
    "RTX 5090": Card(209.5, 104.8, 1792, 32),
    "A100": Card(312, 19.5, 2039, 80),
    "A100 40GB": Card(312, 19.5, 1555, 40),
    "A100 80GB": Card(312, 19.5, 2039, 80),
    "H100": Card(989, 67, 3350, 80),
    "H200": Card(989, 67, 4800, 141),
}


def find_card(name: str) -> tuple[str, Card]:
    """Returns the name of a card as in the table, and the card; small letters and spaces do not matter.

    Raises:
        ValueError: It is not in the table.
    """
    key = name.lower().replace(" ", "")
    for known, card in CARDS.items():
        if known.lower().replace(" ", "") == key:
            return known, card
    raise ValueError(f"card={name!r} is not known{did_you_mean(name, CARDS)}: give one of {', '.join(CARDS)}")
