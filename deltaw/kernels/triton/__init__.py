"""The GPU's versions of the memory-bound kernels, in Triton: each reads its inputs once and writes its outputs once.

The formulas are those of norm.py, rotary.py, lora.py, logprobs.py and spread.py, which derive them and stay the twins
that these are tested against. What a GPU adds is the cost of a pass: the gated MLP's backward in PyTorch's operations
reads or writes a [T, I] tensor fourteen times, here six. Everything is float32 inside and rounded once, on the way out.

Rejected. A matrix product fused with the loss (Apple's cut cross-entropy): saves the chunk of logits but makes the
products twice, and chunks already bound the memory. libdevice's tanh: not in the interpreter that
tests these on a CPU. Autotuning: its search costs seconds per shape, and these kernels wait for memory. `/` where a
result's last bits count: a GPU makes it of an approximate reciprocal, off by up to two units in the last place, which
1 − tanh² hands on to the gradient whole; `div_rn` rounds once, and where a row has one divisor it is a factor.

Tested on a CPU with Triton's interpreter, compiled for an sm_90, and run on an H100 when one is at hand.

This is the only folder that imports triton. Nothing in it is needed on a CPU; device.py says which tensors it takes.
"""

from deltaw.kernels.triton.cross_entropy import cross_entropy_
from deltaw.kernels.triton.factors import spread, spread_table
from deltaw.kernels.triton.gated import gated_backward, gated_forward
from deltaw.kernels.triton.norm import (
    add_rms_norm_backward,
    add_rms_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from deltaw.kernels.triton.rotary import rotary_back, rotary_turn
from deltaw.kernels.triton.sums import factor_sums
from deltaw.kernels.triton.thin import ranked

__all__ = [
    "add_rms_norm_backward",
    "add_rms_norm_forward",
    "cross_entropy_",
    "factor_sums",
    "gated_backward",
    "gated_forward",
    "ranked",
    "rms_norm_backward",
    "rms_norm_forward",
    "rotary_back",
    "rotary_turn",
    "spread",
    "spread_table",
]
