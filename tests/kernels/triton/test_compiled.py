"""Every GPU kernel, compiled for an sm_90."""

import os
import subprocess
import sys

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from deltaw.kernels.triton import cross_entropy, factors, gated, norm, rotary, sums, thin

NUMBERS = '''rows stride grad_row dsum_row x_row delta_row y_row dx_row x_token x_head y_token y_head dq_token dq_head
dk_token dk_head dv_token dv_head cos_token sin_token width d_row g_row u_row inner_row dg_row du_row V
columns ranks a_row a_column out_row blocks share shares'''
SCALARS = {name: "i32" for name in NUMBERS.split()}
SCALARS |= {name: "fp32" for name in ("eps", "offset", "scale", "cap")}
POINTERS = {"r_at": "*fp32", "loss_at": "*fp32", "labels_at": "*i64", "parts_at": "*i64", "scales_at": "*fp32",
            "programs_at": "*i32", "partial_at": "*fp32"}
PART = ("*bf16", "*bf16", "*fp32", *8 * ("i32",))
PART = (*PART[:9], "fp32", "i32", "i32")
TUPLES = {"parts": 4 * (PART,)}

def build(kernel, warps, **fixed):
    names = kernel.arg_names
    known = SCALARS | POINTERS | TUPLES
    types = {n: "constexpr" if n in fixed else known.get(n, "*bf16") for n in names}
    places = {(i,): types[n] for i, n in enumerate(names) if not isinstance(types[n], tuple)}
    for i, n in enumerate(names):
        if n in TUPLES:
            places |= {(i, p, j): kind for p, part in enumerate(TUPLES[n]) for j, kind in enumerate(part)}
    even = {place: [["tt.divisibility", 16]] for place, kind in places.items() if kind == "i32" or kind[0] == "*"}
    source = ASTSource(kernel, types, {(names.index(n),): value for n, value in fixed.items()}, even)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    ptx = made.asm["ptx"]
    ahead = "cp.async.cg.shared.global" in ptx  # 16 bytes at a time, as it is the only width it has
    wide = ("ld.global.v4" in ptx or ahead) and "st.global.v4" in ptx
    print(kernel.__name__, "inexact" if "div.full" in ptx or "div.approx" in ptx else "exact", "v4" if wide else "-")

for size in (64, 2048, 16384):
    block = triton.next_power_of_2(size)
    for adds in (False, True):
        fixed = dict(D=size, BLOCK=block, ROWS=max(1, norm.TILE // block), ADDS=adds)
        build(norm._rms_norm_forward, 16 if size > 8192 else 8, **fixed)
        build(norm._rms_norm_backward, 16 if size > 8192 else 8, **fixed)
build(rotary._rotary_turn, 8, SIGN=-1, H=32, E=128, HALF=64, HEADS=32, PART=64, REST=0)
build(rotary._rotary_turn, 2, SIGN=1, H=9, E=80, HALF=32, HEADS=16, PART=32, REST=16)
build(rotary._rotary_back, 8, H=32, K=8, E=128, HALF=64, HEADS=32, SHARED=8, WHOLE=128, PART=64, REST=0)
build(rotary._rotary_back, 2, H=9, K=3, E=80, HALF=32, HEADS=16, SHARED=4, WHOLE=128, PART=32, REST=16)
for activation in ("silu", "gelu", "gelu_tanh"):
    build(gated._gated_forward, 4, ACT=activation, BLOCK=gated.BLOCK)
    build(gated._gated_backward, 4, ACT=activation, BLOCK=gated.BLOCK)
for capped in (False, True):
    build(cross_entropy._cross_entropy, 16, CAPPED=capped, BLOCK=cross_entropy.VOCABULARY)
build(sums._partial_sums, 4, PARTS=4, STEP=sums.STEP, BLOCK=sums.BLOCK, RANKS=32)
build(sums._add_up, 4, PARTS=4, BLOCK=sums.BLOCK, RANKS=32)
build(thin._ranked, 4, ROWS=32, BLOCK=thin.BLOCKS[1], RANKS=64)
build(factors._spread, 4, OUT=factors.tl.bfloat16, BLOCK=factors.BLOCK)
"""


def test_every_kernel_compiles_for_hopper_and_moves_16_bytes_at_a_time(tmp_path) -> None:
    """The interpreter takes Python that the compiler does not; a GPU is not needed to ask the compiler. Nor to see
    which division it takes: the approximate one put the cross-entropy's gradient beyond its budget."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 28
    narrow = [line.split()[0] for line in done.stdout.splitlines() if not line.endswith("v4")]
    # Strides and addresses that are known only when they run.
    assert narrow == ["_add_up", "_spread"]
    assert done.stdout.count("_cross_entropy exact") == 2
