"""The predictions for GPUs: what is read from machine code, and the arithmetic of the bounds."""

from __future__ import annotations

import importlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# As nvdisasm prints it: a loop over blocks that loads, in it a loop that multiplies, and a loop apart.
LISTING = """\
	.section	.text.first,"ax",@progbits
.text.first:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.LTC128B.128 [R2], [R4.64] ;
        /*0020*/               @P1 LDG.E.64 R6, [R4.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   DEPBAR.LE SB0, 0x2 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_2:
        /*0060*/                   LDSM.16.M88.4 R8, [R0] ;
        /*0070*/                   LDSM.16.MT88.2 R12, [R0+0x100] ;
        /*0080*/                   LDS.U16 R20, [R0] ;
        /*0090*/                   HMMA.16816.F32.BF16 R16, R8, R12, R16 ;
        /*00a0*/                   HMMA.16816.F32.BF16 R20, R8, R14, R20 ;
        /*00b0*/              @!P0 BRA `(.L_x_2) ;
        /*00c0*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*00d0*/                   FFMA R1, R2, R3, R1 ;
        /*00e0*/                   FFMA R1, R2, R3, R1 ;
        /*00f0*/               @P0 BRA `(.L_x_3) ;
        /*0100*/                   EXIT ;
.L_x_4:
        /*0110*/                   BRA `(.L_x_4);
	.section	.nv.info
        /*0120*/                   FFMA R1, R2, R3, R1 ;
.text.second:
.L_x_5:
        /*0000*/                   LDS.128 R4, [R0] ;
        /*0010*/                   LDS R4, [R0] ;
        /*0020*/                   STS.64 [R0], R4 ;
        /*0030*/                   FFMA R1, R2, R3, R1 ;
        /*0040*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0050*/               @P0 BRA `(.L_x_5) ;
        /*0060*/                   EXIT ;
"""


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def sass():
    return importlib.import_module("sass")


@pytest.fixture
def model():
    return importlib.import_module("gpu_model")


@pytest.fixture
def predict():
    return importlib.import_module("predict_gpu")


def test_loops_of_a_listing(sass) -> None:
    kernels = sass.parse(LISTING)
    assert list(kernels) == ["first", "second"]
    code, labels = kernels["first"]
    assert [code[0].opcode, code[2].opcode, len(code)] == ["MOV", "LDG.E.64", 18]
    # The endless branch after the exit is no loop.
    assert sass.loops(code, labels) == [sass.Loop(0x10, 0xC0), sass.Loop(0x60, 0xB0), sass.Loop(0xD0, 0xF0)]


def test_the_hot_loop_and_the_step_around_it(sass) -> None:
    hot = sass.hot_loop(*sass.parse(LISTING)["first"])
    assert hot.inner == sass.Counts(
        multiply_adds=2 * 2048,
        kind="HMMA.16816.F32.BF16",
        instructions=6,
        shared_bytes=512 + 256 + 64,
        global_bytes=0,
        barriers=0,
        pending=0,
        product_instructions=4,
        product_shared_bytes=512 + 256,
        opcodes=Counter(LDSM=2, LDS=1, HMMA=2, BRA=1),
    )
    assert (hot.step.instructions, hot.step.global_bytes, hot.step.shared_bytes) == (6, 512 + 256, 512)
    assert (hot.step.barriers, hot.pending) == (1, 2)

    # However many plain multiply-adds there are.
    plain = "        /*00d0*/                   FFMA R1, R2, R3, R1 ;\n"
    assert sass.hot_loop(*sass.parse(LISTING.replace(plain, 500 * plain))["first"]) == hot

    hot = sass.hot_loop(*sass.parse(LISTING)["second"])
    assert (hot.inner.kind, hot.inner.multiply_adds) == ("FFMA", 32)
    assert hot.inner.shared_bytes == 512 + 128 + 256
    assert (hot.inner.product_instructions, hot.inner.product_shared_bytes) == (3, 512 + 128)
    assert hot.step.instructions == 0
    with pytest.raises(ValueError, match="loop that multiplies"):
        sass.hot_loop(*sass.parse(LISTING.replace("FFMA", "FADD"))["second"])


def test_a_load_that_never_runs_moves_nothing(sass) -> None:
    line = "        /*0060*/                   LDSM.16.M88.4 R8, [R0] ;\n"
    idle = "        /*0060*/              @!PT LDS RZ, [RZ] ;\n"
    inner = sass.hot_loop(*sass.parse(LISTING.replace(line, line + idle))["first"]).inner
    assert (inner.instructions, inner.shared_bytes) == (7, 512 + 256 + 64)


def test_what_a_branch_may_jump_over(sass, model, gpu) -> None:
    jump = "        /*0068*/               @P3 BRA `(.L_x_6) ;\n"
    target = ".L_x_6:\n        /*0090*/                   HMMA"
    listing = LISTING.replace("        /*0070*/", jump + "        /*0070*/")
    listing = listing.replace("        /*0090*/                   HMMA", target)
    copy = "        /*0062*/                   LDGSTS.E.128 [R2], [R4.64] ;\n"
    hot = sass.hot_loop(*sass.parse(listing.replace(".L_x_2:\n", ".L_x_2:\n" + copy))["first"])
    # LDS between the branch and its target; LDSM is a product.
    assert hot.inner.skippable_instructions == 1
    # Without the load the loop is not the step, whose other instructions are not looked into.
    assert sass.hot_loop(*sass.parse(listing)["first"]).inner.skippable_instructions == 0
    tiling = model.Tiling(64, 32, 16, threads=128, resident=2, blocksize=32)
    taken, skipped = (
        model.bounds(gpu, hot, tiling, model.Problem(128, 320, 160), skipping=s) for s in (False, True)
    )
    count = hot.inner.instructions
    assert skipped["issue"] / taken["issue"] == pytest.approx((count - 1) / count)


@pytest.mark.parametrize(
    ("opcode", "operands", "multiply_adds", "shared"),
    [
        ("HMMA.1688.F32.TF32", "R4, R8, R12, R4", 16 * 8 * 8, 0),
        ("HMMA.16816.F32", "R4, R8, R12, R4", 16 * 8 * 16, 0),
        ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR4], R24", 64 * 128 * 16 // 4, 2 * (64 + 128) * 16 // 4),
        ("HGMMA.64x32x16.F32.BF16", "R24, R4, gdesc[UR4], R24", 64 * 32 * 16 // 4, 2 * 32 * 16 // 4),
        ("FFMA", "R1, R2, R3, R1", 32, 0),
        ("FADD", "R1, R2, R3", 0, 0),
    ],
)
def test_what_a_warp_multiplies(sass, opcode: str, operands: str, multiply_adds: int, shared: int) -> None:
    instruction = sass.Instruction(0, opcode, operands)
    assert instruction.multiply_adds == multiply_adds
    assert instruction.operand_bytes == shared


@pytest.fixture
def hot(sass):
    """A loop of four matrix products, in one turn of which a step of 16 columns is done."""
    inner = sass.Counts(4 * 2048, "HMMA.16816.F32.BF16", 100, 2048, 1024, 1, 1, 30, 1536, Counter())
    return sass.HotLoop(inner, sass.count([]))


@pytest.fixture
def gpu(model):
    # One clock a second, and numbers that multiply by head.
    return model.Gpu("test", "80", 10, 1.0, 1024, 64, 0.5, 1000, 1e6)


def test_each_bound_by_hand(model, hot, gpu) -> None:
    # 4 warps: 64 x 32 x 16 multiply-adds are one turn.
    tiling = model.Tiling(64, 32, 16, threads=128, resident=2, blocksize=32)
    problem = model.Problem(128, 320, 160, sparsity=0.5)
    found = model.bounds(gpu, hot, tiling, problem)
    # 20 thread blocks on 10 multiprocessors, 10 steps each of which half are kept: 2 x 4 x 5 turns.
    assert found["tensor"] == pytest.approx(40 * 8192 / 512)
    assert found["shared"] == pytest.approx(40 * 2048 / 128)
    assert found["issue"] == pytest.approx(40 * 100 / 4)
    assert found["latency"] == pytest.approx(5 * 1 * model.STEP_LATENCY / 2)
    assert found["L2"] == pytest.approx(20 * 5 * 16 * 2 * (64 + 32) / 700)
    assert found["memory"] == pytest.approx(2 * (128 * 480 + 320 * 160 / 2) / 0.9e6)
    assert model.predicted(gpu, hot, tiling, problem) == (found["latency"], "latency")

    # 33 thread blocks take as long as 40; two rounds of waiting where only one fits.
    more = model.bounds(gpu, hot, tiling, replace(problem, samples=129, out_features=352))
    assert more["issue"] == pytest.approx(80 * 100 / 4)
    alone = model.bounds(gpu, hot, replace(tiling, resident=1), problem)
    assert alone["latency"] == pytest.approx(2 * found["latency"])
    # Samples that fill a tile in part are all that is loaded of it.
    few = model.bounds(gpu, hot, tiling, replace(problem, samples=1))
    assert few["L2"] == pytest.approx(10 * 5 * 16 * 2 * (1 + 32) / 700)
    # Twice the work in a turn is half the turns; work that warps repeat is added.
    repeated = model.bounds(gpu, hot, replace(tiling, issued_share=2.0), problem)
    assert repeated["shared"] == pytest.approx(2 * found["shared"])


def test_a_union_of_block_rows_is_walked_once(model, sass, hot, gpu) -> None:
    step = replace(sass.count([]), instructions=40, shared_bytes=512)
    hot = replace(hot, step=step)
    # Two block rows of 16: three quarters of the columns are kept in one of them at least.
    tiling = model.Tiling(64, 32, 16, threads=128, resident=2, blocksize=16)
    found = model.bounds(gpu, hot, tiling, model.Problem(128, 320, 160, sparsity=0.5))
    assert found["tensor"] == pytest.approx(40 * 8192 / 512)
    assert found["latency"] == pytest.approx(7.5 * model.STEP_LATENCY / 2)
    # The inputs come for the union, the weights only where kept.
    assert found["L2"] == pytest.approx(20 * 16 * 2 * (7.5 * 64 + 5 * 32) / 700)
    # 2 thread blocks x 4 warps x 7.5 turns; two thirds of the products in them.
    assert found["issue"] == pytest.approx(60 * (70 + 30 * 2 / 3 + 40) / 4)
    assert found["shared"] == pytest.approx(60 * (512 + 1536 * 2 / 3 + 512) / 128)


@pytest.mark.parametrize(
    ("kind", "name", "rate"),
    [
        ("HMMA.1688.F32.TF32", "tensor", 256),
        ("HGMMA.64x64x16.F32.BF16", "tensor", 1024),
        ("FFMA", "float", 64),
    ],
)
def test_the_rate_is_that_of_the_instruction(model, hot, gpu, kind: str, name: str, rate: int) -> None:
    tiling = model.Tiling(64, 32, 16, threads=128, resident=2, blocksize=32)
    hot = replace(hot, inner=replace(hot.inner, kind=kind))
    found = model.bounds(gpu, hot, tiling, model.Problem(128, 320, 160, sparsity=0.5))
    assert found[name] == pytest.approx(40 * 8192 / rate)


def test_dense_and_the_crossover(model, hot, gpu) -> None:
    problem = model.Problem(1000, 320, 160)
    assert model.dense_seconds(gpu, problem) == pytest.approx(1000 * 320 * 160 / (1024 * 10 * 0.8))
    assert model.dense_seconds(gpu, problem, itemsize=4) == pytest.approx(1000 * 320 * 160 / (64 * 10 * 0.8))
    slow = replace(gpu, memory_bandwidth=10.0)
    assert model.dense_seconds(slow, problem) == pytest.approx(2 * (320 * 160 + 1000 * 480) / 9)
    # Bound by its products at half the rate, and dense at 80 %: even at a density of 0.625.
    fast = replace(
        hot.inner,
        instructions=1,
        shared_bytes=1,
        pending=1000,
        product_instructions=0,
        product_shared_bytes=0,
    )
    tiling = model.Tiling(64, 32, 16, threads=128, resident=2, blocksize=32)
    wide = replace(gpu, l2_bytes_per_clock=10**9, memory_bandwidth=1e12)
    problem = model.Problem(6400, 320, 160)
    at = model.crossover(wide, replace(hot, inner=fast), tiling, problem)
    assert at == pytest.approx(1 - 0.5 / 0.8, abs=1e-6)
    assert (
        model.crossover(replace(wide, mma_sync_share=1e-6), replace(hot, inner=fast), tiling, problem) is None
    )
    assert (
        model.crossover(replace(wide, mma_sync_share=2.0), replace(hot, inner=fast), tiling, problem) == 0.0
    )


def test_datasheets_agree_with_the_rates(model) -> None:
    peaks = {
        name: 2 * gpu.multiply_adds * gpu.multiprocessors * gpu.clock / 1e12
        for name, gpu in model.GPUS.items()
    }
    assert peaks == pytest.approx({"A100": 312, "H100": 989, "H200": 989}, rel=2e-3)


def test_the_report_names_kernels_bounds_and_crossovers(predict, hot) -> None:
    kernels = {
        architecture: {"block_sparse_linear_f32": (hot, 4), "other": (hot, 4)}
        for architecture in ("80", "90")
    }
    candidate = predict.Candidate(hot, predict.Tiling(128, 16, 16, 128, 4, 16))
    text = predict.report(kernels, {("80", 16, 4096): candidate})
    assert text.count("**A100") == 3
    assert text.count("| block_sparse_linear_f32 |") == 3 * 3 * 4
    assert text.count("| torch BSR (Triton) | 16 |") == 1
    assert "other" not in text
    row = next(line for line in text.splitlines() if "Triton" in line).split("|")
    assert row[-2].strip().rstrip("%").isdigit() or row[-2].strip() == "never"
    assert len(row) == 9
    assert "| block_sparse_linear_f32 | 90 | HMMA" in predict.loops_table(kernels)
    assert "other" not in predict.loops_table(kernels)


def test_a_folder_without_kernels_is_named(predict, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make cuda-check"):
        predict.read_kernels(tmp_path, "80")


def test_the_float32_kernel_is_read_from_its_cubin(
    predict, sass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("nvcc") is None or sass.find_nvdisasm() is None:
        pytest.skip("needs nvcc and nvdisasm")
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    gate = importlib.import_module("ptx.compile_gate")
    source = ROOT / "csrc" / "kernels" / "cuda" / "block_sparse_linear.cu"
    kernels = [gate.as_record(kernel) for kernel in gate.compile_kernels(source, "80", tmp_path)]
    (tmp_path / "report.json").write_text(json.dumps({"kernels": kernels}))
    hot, resident = predict.read_kernels(tmp_path, "80")["block_sparse_linear_f32"]
    assert resident == next(k["resident_blocks"] for k in kernels if k["name"] == "block_sparse_linear_f32")
    # Four columns in a turn: 4 inputs and 2 weights for 8 multiply-adds.
    assert (hot.inner.kind, hot.inner.opcodes["FFMA"], hot.inner.shared_bytes) == (
        "FFMA",
        32,
        4 * (4 * 128 + 256),
    )
    assert hot.step.barriers == 2


def test_pytorchs_kernel_compiles_without_a_gpu(
    predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="torch brings no triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    candidate = predict.triton_candidate("80", 64, 4096, tmp_path)
    assert "HMMA.16816.F32.BF16" in candidate.hot.inner.kind
    assert candidate.tiling.tile_outputs == candidate.tiling.step_columns == 64
    # A turn of the loop is a whole number of steps.
    step = 64 * candidate.tiling.tile_samples * 64 / (candidate.tiling.threads // 32)
    assert candidate.hot.inner.multiply_adds % step == 0
