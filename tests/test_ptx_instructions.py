"""The interpreter of PTX itself, on kernels written here: what instructions do, and what it refuses."""

import struct
import sys

import numpy as np
import pytest
import torch
from ptx import Counts, Device, PtxError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the interpreter needs Linux")

KERNEL = """
.visible .entry kernel(
    .param .u64 kernel_param_0,
    .param .u64 kernel_param_1,
    .param .u32 kernel_param_2
)
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<40>;
    .reg .f32 %f<40>;
    .reg .f64 %fd<9>;
    .reg .b64 %rd<9>;
    {shared}
    ld.param.u64 %rd1, [kernel_param_0];
    ld.param.u64 %rd2, [kernel_param_1];
    ld.param.u32 %r1, [kernel_param_2];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd3, %r0, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    {body}
    ret;
}}
"""


def run(body, given, made, threads=32, number=0, shared="", counts=None, blocks=1):
    """Each thread has its element of `given` at [%rd4] and of `made` at [%rd5], and the number in %r1."""
    device = Device([KERNEL.format(body=body, shared=shared)], (lambda name: counts) if counts else None)
    device.allow(given)
    device.allow(made)
    device.launch("kernel", struct.pack("<qqi", given.data_ptr(), made.data_ptr(), number), blocks, threads, 0)
    return made


def of_each(body, given, dtype=None):
    return run(body, given, torch.zeros(len(given), dtype=dtype or given.dtype))


INTEGERS = torch.tensor([0, 1, -1, 7, -7, 40, -40, 2**31 - 1, -(2**31), 123456789] * 4, dtype=torch.int32)[:32]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("div.s32 %r3, %r2, 7;", lambda x: int(x / 7)),
        ("rem.s32 %r3, %r2, 7;", lambda x: x - int(x / 7) * 7),
        ("div.u32 %r3, %r2, 7;", lambda x: x % 2**32 // 7),
        ("mul.hi.s32 %r3, %r2, -1431655765;", lambda x: x * -1431655765 >> 32),
        ("mad.lo.s32 %r3, %r2, 3, %r2;", lambda x: 4 * x),
        ("shr.s32 %r3, %r2, 40;", lambda x: -(x < 0)),
        ("shl.b32 %r3, %r2, 32;", lambda x: 0),
        ("bfi.b32 %r3, %r2, 0, 8, 4;", lambda x: (x & 15) << 8),
        ("bfe.u32 %r3, %r2, 8, 4;", lambda x: x >> 8 & 15),
        ("bfe.s32 %r3, %r2, 8, 4;", lambda x: (x >> 8 & 15 ^ 8) - 8),
        ("prmt.b32 %r3, %r2, 0, 0x0123;", lambda x: int.from_bytes((x % 2**32).to_bytes(4, "little"), "big")),
        ("setp.lt.s32 %p1, %r2, 7; selp.b32 %r3, 5, %r2, %p1;", lambda x: 5 if x < 7 else x),
        ("shf.l.wrap.b32 %r3, %r2, %r2, 8;", lambda x: x << 8 | x % 2**32 >> 24),
        ("mov.b32 %r3, 1; setp.ge.s32 %p1, %r2, 0; @%p1 bra $A; mov.b32 %r3, 2;\n$A:\n", lambda x: 1 + (x < 0)),
        ("cvt.s64.s32 %rd6, %r2; mul.lo.s64 %rd6, %rd6, 5; shr.s64 %rd6, %rd6, 3; cvt.u32.u64 %r3, %rd6;",
         lambda x: x * 5 >> 3),
    ],
)  # fmt: skip
def test_integers(instruction, expected):
    found = of_each(f"ld.global.s32 %r2, [%rd4]; {instruction} st.global.u32 [%rd5], %r3;", INTEGERS)
    assert [int(v) % 2**32 for v in found] == [expected(int(x)) % 2**32 for x in INTEGERS]


NUMBERS = torch.tensor([0.0, -0.0, 1.5, -1.5, 2.5, 1e30, -1e30, 3.1415927, float("nan"), float("inf"), 1 / 3] * 3)[:32]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("cvt.rmi.f32.f32 %f2, %f1;", torch.floor),
        ("cvt.rni.f32.f32 %f2, %f1;", torch.round),
        ("cvt.rzi.s32.f32 %r2, %f1; cvt.rn.f32.s32 %f2, %r2;",
         lambda x: x.nan_to_num(0).clamp(-(2**31), 2**31).trunc()),
        ("setp.ltu.f32 %p1, %f1, 0f3F800000; selp.f32 %f2, %f1, 0f3F800000, %p1;",
         lambda x: torch.where(x >= 1, 1.0, x)),
        ("max.f32 %f2, %f1, 0f00000000;", lambda x: torch.where(x.isnan() | (x <= 0), 0.0, x)),
        ("cvt.rn.bf16.f32 %rs1, %f1; cvt.f32.bf16 %f2, %rs1;", lambda x: x.bfloat16().float()),
        ("cvt.rn.f16.f32 %rs1, %f1; cvt.f32.f16 %f2, %rs1;", lambda x: x.half().float()),
        ("cvt.rn.bf16x2.f32 %r2, %f1, 0f00000000; mov.b32 %f2, %r2;", lambda x: x.bfloat16().float()),
        ("fma.rn.f32 %f2, %f1, 0f40000000, %f1;", lambda x: 3 * x),
    ],
)  # fmt: skip
def test_floats(instruction, expected):
    found = of_each(f"ld.global.f32 %f1, [%rd4]; {instruction} st.global.f32 [%rd5], %f2;", NUMBERS)
    torch.testing.assert_close(found, expected(NUMBERS), equal_nan=True, rtol=0, atol=0)


def test_tf32_is_rounded_to_ten_bits_ties_away():
    given = torch.tensor([1 + 2**-11, 1 + 2**-12, -1 - 2**-11, 1 + 3 * 2**-11, 0.0] * 7)[:32]
    found = of_each("ld.global.f32 %f1, [%rd4]; cvt.rna.tf32.f32 %r2, %f1; st.global.b32 [%rd5], %r2;", given)
    step = 2**-10
    assert found[:5].tolist() == [1 + step, 1.0, -1 - step, 1 + 2 * step, 0.0]


def test_products_of_tf32_matrices():
    """Fragments as the PTX manual gives them for m16n8k8: rows by groups of four lanes, columns within a group."""
    torch.manual_seed(0)
    a, b = torch.randint(-8, 9, (16, 8)).float(), torch.randint(-8, 9, (8, 8)).float()
    lane = torch.arange(32)
    group, place = lane // 4, lane % 4
    words = [a[group, place], a[group + 8, place], a[group, place + 4], a[group + 8, place + 4]]
    words += [b[place, group], b[place + 4, group]]
    loads = " ".join(f"ld.global.b32 %r{10 + i}, [%rd4+{128 * i}];" for i in range(6))
    stores = " ".join(f"st.global.f32 [%rd5+{128 * i}], %f{i};" for i in range(4))
    zeros = " ".join(f"mov.f32 %f{i}, 0f3F800000;" for i in range(4))
    multiply = (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0,%f1,%f2,%f3}, {%r10,%r11,%r12,%r13}, {%r14,%r15}, "
        "{%f0,%f1,%f2,%f3};"
    )
    found = run(f"{loads} {zeros} {multiply} {stores}", torch.stack(words), torch.zeros(4, 32))
    product = a @ b + 1
    for i, (row, column) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
        assert torch.equal(found[i], product[group + row, 2 * place + column])


def test_atomic_additions_of_one_place_follow_each_other():
    body = "atom.global.add.u32 %r2, [%rd1], 3; st.global.u32 [%rd5], %r2;"
    given = torch.zeros(1, dtype=torch.int32)
    found = run(body, given, torch.zeros(64, dtype=torch.int32), threads=64)
    assert given.item() == 3 * 64 and sorted(found.tolist()) == list(range(0, 3 * 64, 3))


def test_vectors_are_stored_whole():
    body = "mul.wide.u32 %rd3, %r0, 16; add.s64 %rd5, %rd2, %rd3; st.global.v4.b32 [%rd5], {%r0, %r1, %r1, %r0};"
    found = run(body, torch.zeros(1), torch.zeros(32, 4, dtype=torch.int32), number=5)
    lane = torch.arange(32, dtype=torch.int32)
    assert torch.equal(found, torch.stack([lane, 0 * lane + 5, 0 * lane + 5, lane], 1))


SHARED = ".shared .align 16 .b8 array[256];"
WRITE = "shl.b32 %r2, %r0, 2; mov.u32 %r3, array; add.s32 %r2, %r2, %r3; st.shared.u32 [%r2], %r0;"


@pytest.mark.parametrize(
    ("body", "shared", "said"),
    [
        ("frobnicate.b32 %r2, %r0;", "", "the interpreter knows, got 'frobnicate.b32 %r2, %r0'"),
        ("add.sat.s32 %r2, %r0, 1;", "", "knows, got 'add.sat.s32 %r2, %r0, 1'"),
        ("add.s32 %r2, %r3, 1;", "", "%r3: expected a register that has been written"),
        ("ld.global.u32 %r2, [%rd4+4096];", "", "expected addresses within a tensor"),
        ("ld.global.u32 %r2, [%rd4+-4];", "", "expected addresses within a tensor"),
        ("ld.global.u32 %r2, [%rd4+2];", "", "expected addresses divisible by 4"),
        ("st.global.v4.u32 [%rd5], {%r0, %r0, %r0, %r0};", "", "expected addresses divisible by 16"),
        ("st.shared.u32 [%r0], %r0;", SHARED, "expected shared addresses divisible by 4"),
        ("mov.u32 %r2, 256; st.shared.u32 [%r2], %r0;", SHARED, "expected 256 bytes of shared memory to suffice"),
        (f"{WRITE} xor.b32 %r2, %r2, 128; ld.shared.u32 %r4, [%r2];", SHARED, "a barrier between a warp's write and"),
        (f"ld.shared.u32 %r4, [array]; {WRITE}", SHARED, "a barrier between a warp's read and another's write"),
        ("st.shared.u32 [array], %r0;", SHARED, "expected warps to write to different places"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra $END; bar.warp.sync -1;\n$END:\n", "", "expected whole warps"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", "", "threads of a block, but some have ended"),
    ],
)  # fmt: skip
def test_what_the_machine_would_not_allow_is_refused(body, shared, said):
    with pytest.raises(PtxError, match=said):
        run(body, torch.zeros(64), torch.zeros(64), threads=64, shared=shared)


COPY = """
    mul.wide.u32 %rd3, %r0, 16; add.s64 %rd6, %rd1, %rd3; shl.b32 %r2, %r0, 4;
    cp.async.cg.shared.global [%r2], [%rd6], 16; cp.async.commit_group;
    {wait}
    ld.shared.f32 %f1, [%r2]; st.global.f32 [%rd5], %f1;
"""


@pytest.mark.parametrize(
    ("wait", "arrives"), [("cp.async.wait_group 0;", True), ("cp.async.wait_group 1;", False), ("", False)]
)
def test_copies_arrive_when_their_thread_waits(wait, arrives):
    shared = ".shared .align 16 .b8 array[512];"
    found = run(COPY.format(wait=wait), torch.arange(128).float(), torch.zeros(32), shared=shared)
    assert torch.equal(found, torch.arange(0, 128, 4).float()) if arrives else found.isnan().all()


def test_what_is_counted():
    counts = Counts()
    # Every second element: twice the sectors that its bytes would fill. Every eighth word: eight lanes share a bank.
    body = """
        mul.wide.u32 %rd3, %r0, 8; add.s64 %rd6, %rd1, %rd3; ld.global.u32 %r2, [%rd6];
        shl.b32 %r3, %r0, 5; st.shared.u32 [%r3], %r2;
        setp.lt.u32 %p1, %r0, 32; @%p1 bra $END; add.s32 %r2, %r2, 1;
        $END:
    """
    run(body, torch.zeros(128), torch.zeros(1), threads=64, shared=".shared .align 16 .b8 array[2048];", counts=counts)
    assert (counts.requests, counts.sectors, counts.fewest_sectors) == (2, 16, 8)
    assert (counts.shared_requests, counts.wavefronts, counts.fewest_wavefronts) == (2, 16, 2)
    assert counts.issued["add.s32"] == 1 and counts.issued["ld.global.u32"] == 2
    assert np.isclose(sum(counts.issued.values()), 2 * (7 + 3 + 2 + 2 + 1) + 1)
