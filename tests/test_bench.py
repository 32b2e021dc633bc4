"""Measuring and explaining: the simulator against brute force, the table of backends, and the benchmark's rows."""
import csv
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch

from visionattn import bench, ops
from visionattn.bench import command, exported, peers, timing, training
from visionattn.cli import main
from visionattn.export import export_onnx
from visionattn.ops import Case, dispatch, neighborhood_attention, use_backend
from visionattn.ops.neighborhood import naive
from visionattn.simulate import simulate

TOOLS = Path(__file__).parent.parent / "tools"
WINDOWS = {
    # name: size, kernel_size, dilation, stride, is_causal, q_tile, kv_tile
    "line": ((70,), (7,), (1,), (1,), (False,), (8,), (4,)),
    "causal line": ((70,), (7,), (3,), (4,), (True,), (16,), (8,)),
    "plane": ((13, 17), (5, 3), (1, 1), (1, 1), (False, False), (4, 4), (4, 8)),
    "dilation that does not divide": ((13, 17), (3, 4), (2, 4), (1, 1), (False, False), (4, 2), (2, 4)),
    "strided": ((14, 20), (6, 7), (2, 1), (3, 7), (False, False), (3, 8), (2, 8)),
    "strided, causal": ((15, 12), (5, 4), (1, 2), (4, 3), (True, False), (8, 4), (4, 4)),
    "volume": ((5, 6, 7), (3, 4, 3), (1, 1, 2), (2, 3, 1), (True, False, False), (2, 2, 4), (1, 4, 2)),
}


def brute_force(size, kernel_size, dilation, stride, is_causal, q_tile, kv_tile):
    """Every query and key of the map one by one: key tiles seen by each query tile, all key tiles, number of pairs."""
    windows = [naive.axis_windows(*axis) for axis in zip(size, kernel_size, dilation, stride, is_causal, strict=True)]

    def tile(position, shape):
        return tuple((x % d, x // d // t) for x, d, t in zip(position, dilation, shape, strict=True))

    visits, pairs = {}, 0
    for query in itertools.product(*map(range, size)):
        seen = [keys[x][valid[x]].tolist() for x, (keys, _, valid) in zip(query, windows, strict=True)]
        for key in itertools.product(*seen):
            visits.setdefault(tile(query, q_tile), set()).add(tile(key, kv_tile))
            pairs += 1
    return visits, {tile(key, kv_tile) for key in itertools.product(*map(range, size))}, pairs


@pytest.mark.parametrize("problem", WINDOWS.values(), ids=WINDOWS)
def test_simulation_equals_brute_force(problem):
    visits, key_tiles, pairs = brute_force(*problem)
    found = simulate(*problem)
    visited = sum(map(len, visits.values()))
    computed = visited * math.prod(found.q_tile) * math.prod(found.kv_tile)
    assert found.query_tiles == len(visits)
    assert found.key_tiles == len(key_tiles)
    assert found.visited == visited
    assert found.most == max(map(len, visits.values()))
    assert found.fraction == visited / (len(visits) * len(key_tiles))
    assert found.flop_speedup == math.prod(problem[0]) ** 2 / pairs
    assert found.speedup == math.prod(problem[0]) ** 2 / computed
    assert found.efficiency == pytest.approx(found.speedup / found.flop_speedup)
    assert found.perfectly_sparse == (computed == pairs)


@pytest.mark.parametrize(("size", "kernel_size", "stride", "q_tile", "kv_tile", "speedup"), [
    # A stride that is the query tile, windows and maps of whole tiles: perfect, says arXiv 2504.16922.
    ((256, 256), 80, 16, (16, 16), (16, 8), 10.24),
    ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 8, 8), 100 / 9),
    ((16, 16), 8, 8, (8, 8), (8, 8), 4.0),  # windows that do not overlap
    ((64,), 64, 1, (16,), (16,), 1.0),  # the window is the map: plain attention
])
def test_perfectly_block_sparse(size, kernel_size, stride, q_tile, kv_tile, speedup):
    found = simulate(size, kernel_size, 1, stride, False, q_tile, kv_tile)
    assert found.perfectly_sparse
    assert found.efficiency == 1
    assert found.speedup == found.flop_speedup == pytest.approx(speedup)


def test_not_perfectly_block_sparse():
    # One token of stride less, and no window begins where a tile does.
    found = simulate((256, 256), 80, 1, 15, False, (16, 16), (16, 8))
    assert not found.perfectly_sparse
    assert found.speedup < found.flop_speedup
    # The query tile is ragged: 30 is no multiple of 4.
    assert not simulate((30, 48, 80), (18, 24, 24), 1, (16, 8, 8), False, (4, 8, 8), (2, 8, 8)).perfectly_sparse


def test_simulation_searches_tiles():
    best = simulate((56, 56), 7)
    each = [simulate((56, 56), 7, q_tile=q, kv_tile=kv)
            for q, kv in itertools.product([(8, 8), (4, 16), (16, 4), (8, 16), (16, 8), (16, 16)], repeat=2)]
    assert best.speedup == max(found.speedup for found in each)
    assert simulate((56, 56), 7, q_tile=best.q_tile) == best
    perfect = simulate((256, 256), 80, stride=16)
    assert (perfect.q_tile, perfect.kv_tile) == ((16, 16), (16, 16))  # the largest of those that are perfect


@pytest.mark.parametrize(("arguments", "message"), [
    (["--size", "8", "8", "8", "8", "--kernel", "3"], "size must be 1 to 3 positive numbers"),
    (["--size", "8", "--kernel", "9"], "exceeds the 8 tokens"),
    (["--size", "8", "8", "--kernel", "3", "3", "3"], "kernel_size has 3 values for 2 spatial axes"),
    (["--size", "8", "8", "--kernel", "3", "--stride", "4"], "stride must be 1 to kernel_size"),
    (["--size", "8", "8", "--kernel", "3", "--q-tile", "4"], "q_tile must be 2 positive numbers"),
])
def test_simulate_says_what_is_wrong(arguments, message, capsys):
    assert main(["bench", "simulate", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_simulate_command(capsys):
    command = "bench simulate --size 30 48 80 --kernel 18 24 24 --stride 16 8 8 --q-tile 2 8 8 --kv-tile 2 8 8"
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "81.00 per query tile (most 81) of 900, 9.00 %" in out
    assert "11.11 x over dense attention" in out
    assert "perfectly block sparse  yes" in out


def rows_of(table, op):
    lines = table.split(f"{op} on cpu\n")[1].split("\n\n")[0].splitlines()
    names, body = lines[0].split(), [line.split() for line in lines[1:] if not line.strip().startswith("(")]
    return [dict(zip(names, line, strict=True)) for line in body]


def test_backends(capsys, monkeypatch):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["backends"]) == 0
    table = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in table
    rows = rows_of(table, "neighborhood_attention")
    assert len(rows) == 8
    assert all(row["halo"] == "chosen" and row["naive"] == "yes" and row["triton"].startswith("(") for row in rows)
    assert "triton compiles for cuda devices, not for cpu" in table
    assert all(row["gathered"] == "chosen" for row in rows_of(table, "routed_attention"))


def test_backends_says_what_was_asked_for(monkeypatch):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"):
        rows = rows_of(bench.backend_table(), "neighborhood_attention")
    single = [row for row in rows if row["dtype"] == "float32"]
    assert all(row["triton"] == "chosen" and row["halo"] == "yes" for row in single)
    half = [row for row in rows if row["dtype"] == "bfloat16"]  # a call would raise
    assert all("chosen" not in row.values() and row["triton"].startswith("(") for row in half)


@pytest.fixture
def toy():
    """An op with one backend and one example, written in one go."""
    class Problem(NamedTuple):
        tokens: int
        dtype: torch.dtype = torch.float32
        device: str = "cpu"
        requires_grad: bool = False

    def half(problem):
        return (True, "") if problem.dtype == torch.bfloat16 else (False, "toys are made of bfloat16")

    dispatch.Op("toy_attention", [
        dispatch.Backend("wooden", half, lambda q: q), dispatch.Backend("naive", dispatch.any_problem, lambda q: q),
    ], {"train_set": Case(Problem(3), {"q": (1, 3, 1, 2)}, summary="of three tokens")})
    yield
    del dispatch._OPS["toy_attention"]


def test_backends_shows_an_op_that_is_written_in_one_go(toy):
    table = bench.backend_table()
    rows = rows_of(table, "toy_attention")
    assert len(rows) == 4
    assert {row["example"] for row in rows} == {"train_set"}
    assert all(row["naive"] == ("chosen" if row["dtype"] == "float32" else "yes") for row in rows)
    assert all(row["wooden"] == ("(1)" if row["dtype"] == "float32" else "chosen") for row in rows)
    assert "(1) toys are made of bfloat16" in table


def test_backends_shows_every_op(capsys):
    assert main(["backends"]) == 0
    table = capsys.readouterr().out
    for op in ("neighborhood_attention", "routed_attention", "kmeans_attention", "agent_attention",
               "varied_window_attention", "aggregated_attention", "flow_attention", "combiner_attention",
               "reversed_attention", "sparsified_attention", "factorized_attention"):
        rows = rows_of(table, op)
        assert len(rows) == 8
        assert all(list(row.values()).count("chosen") == 1 and row["naive"] == "yes" for row in rows)


def test_backends_shows_what_is_held():
    ops.release_memory()
    assert "held between calls: 0 bytes" in bench.backend_table()
    neighborhood_attention(**ops.cases("neighborhood_attention")["56x56_bias"].arguments())
    assert ops.held_bytes() > 2**20
    assert f"held between calls: {ops.held_bytes() / 2**20:.1f} MiB" in bench.backend_table()
    ops.release_memory()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("op", "case"), [
    ("neighborhood", "small_map"), ("neighborhood", "small_bias"), ("neighborhood", "small_strided"),
    ("routed", "small")])
@pytest.mark.filterwarnings("ignore")
def test_benchmark_times_what_is_right(op, case, backward):
    machine = bench.Machine({}, bytes_per_second=1e9, flops_per_second=1e9)
    rows = {row["backend"]: row for row in bench.benchmark(
        op, case, backward, torch.float32, repeat=2, machine=machine)}
    ours = {"neighborhood": "halo", "routed": "gathered"}[op]
    assert set(rows) >= {ours, "naive", "masked_sdpa", "dense_sdpa", "flex"}
    for name, row in rows.items():
        timed = bool(row["median_ms"])
        assert timed == (row["runs"] == 2) == bool(row["peak_mib"])
        assert not row["note"].startswith("wrong result"), row
        assert timed or row["note"]
        assert timed or name in ("natten", "flex")  # the only ones that cannot do all of it on a CPU
    assert float(rows[ours]["ratio_to_ours"]) == 1
    assert float(rows["dense_sdpa"]["speedup_over_dense"]) == 1
    assert "does not support backward on CPU" in rows["flex"]["note"] or not backward
    example = ops.cases(f"{op}_attention")[case]
    batch, height, width, heads, dim = example.inputs["q"]
    window = math.prod(example.problem.kernel_size) if op == "neighborhood" else 2 * 4 * 4
    tokens = batch * heads * height * width
    flops = 4 * dim * tokens * window * (3.5 if backward else 1)
    size = 4 * tokens * 2 * (dim + example.problem.value_dim) * (3 if backward else 1)
    assert float(rows[ours]["flops_ms"]) == pytest.approx(flops / 1e6, rel=1e-3)
    assert float(rows[ours]["bytes_ms"]) == pytest.approx(size / 1e6, rel=1e-3)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("op", "ours"), [("kmeans", "gathered"), ("agent", "fused"), ("neighborhood", "halo"),
                                          ("routed", "gathered"), ("varied_window", "sampled"),
                                          ("aggregated", "shifted"), ("reversed", "blocked"),
                                          ("sparsified", "gathered")])
@pytest.mark.filterwarnings("ignore")
def test_benchmark_times_every_small_case_of_every_op(op, ours, backward):
    for name, case in ops.cases(f"{op}_attention").items():
        if "small" in case.groups:
            rows = {row["backend"]: row for row in bench.benchmark(op, name, backward, torch.float32, repeat=1)}
            assert rows[ours]["median_ms"], (name, rows)
            assert rows["naive"]["median_ms"], (name, rows)
            assert not any(row["note"].startswith("wrong result") for row in rows.values()), (name, rows)


def test_a_wrong_result_is_not_timed(monkeypatch):
    def wrong(q, k, v, *options, backend, **more):
        out = neighborhood_attention(q, k, v, *options, backend=backend, **more)
        return out * 1.001 if backend == "halo" else out

    monkeypatch.setattr(ops, "neighborhood_attention", wrong)
    rows = {row["backend"]: row for row in bench.benchmark("neighborhood", "small_map", True, torch.float32, repeat=1)}
    assert rows["halo"]["note"] == "wrong result: relative error 1.0e-03"
    assert rows["halo"]["runs"] == 0
    assert rows["halo"]["median_ms"] == rows["halo"]["peak_mib"] == ""
    assert rows["naive"]["median_ms"]


@pytest.mark.parametrize("op", ["neighborhood", "routed"])
def test_head_by_head_is_the_same(monkeypatch, op):
    # Only naive is split, and only above the limit; the others are compared with its result either way.
    monkeypatch.setattr(timing, "_GATHER_LIMIT", 1)
    case = {"neighborhood": "small_bias", "routed": "small"}[op]
    rows = {row["backend"]: row for row in bench.benchmark(op, case, True, torch.float32, repeat=1)}
    assert rows["naive"]["note"] == "head by head"
    assert not any(row["note"].startswith("wrong") for row in rows.values())


def test_peers_that_hold_all_scores_are_left_out(monkeypatch):
    # Dense attention holds none: it stays.
    monkeypatch.setattr(peers, "_SCORES_LIMIT", 9 * 11 * 9 * 11)
    monkeypatch.setattr(timing, "_NATTEN_LIMIT", 9 * 11 * 9 * 11)
    rows = {row["backend"] for row in bench.benchmark("neighborhood", "small_map", False, torch.float32, repeat=1)}
    assert rows == {"halo", "naive", "dense_sdpa"}


def test_bench_ops_writes_a_table_and_a_picture(monkeypatch, tmp_path, capsys):
    examples = dispatch._OPS["neighborhood_attention"].cases
    for name in ("small_map", "small_strided"):
        monkeypatch.setitem(examples, name, examples[name]._replace(groups=("scaling",)))
    for name in ("32x32_h4", "64x64_h4", "128x128", "256x256"):
        monkeypatch.delitem(examples, name)
    monkeypatch.setattr(command, "measure_machine", lambda device, dtype: bench.Machine({
        "machine": "a CPU", "threads": 1, "torch": "2", "date": "2000-01-01"}, 1e9, 1e9))
    out = tmp_path / "new" / "ops.csv"
    assert main(["bench", "ops", "--ops", "neighborhood", "--cases", "scaling", "--directions", "forward",
                 "--threads", "1", "--repeat", "1", "--plot", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert {(row["case"], row["backend"]) for row in rows} >= {
        ("small_map", "halo"), ("small_strided", "naive")}
    assert {row["machine"] for row in rows} == {"a CPU"}
    assert out.with_name("ops_scaling.png").stat().st_size > 10000
    # The tables of docs/kernels.md are made of such a file.
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured tables -->\nold\n<!-- end of measured tables -->\nafter\n")
    subprocess.run([sys.executable, TOOLS / "write_measured_tables.py", out, page], check=True)
    text = page.read_text()
    assert text.startswith("before\n<!-- measured tables -->\n")
    assert text.endswith("<!-- end of measured tables -->\nafter\n")
    assert "old" not in text
    assert "a CPU" in text
    halo = next(row for row in rows if (row["case"], row["backend"]) == ("small_map", "halo"))
    assert halo["median_ms"] in text


def test_bench_ops_refuses_what_it_cannot_do(capsys):
    for arguments in (["--cases", "no_such_case"], ["--ops", "routed", "--cases", "56x56_bias"]):
        with pytest.raises(SystemExit):
            main(["bench", "ops", *arguments])
    error = capsys.readouterr().err
    assert "no_such_case" in error
    assert "no case of the chosen ops has that name" in error


@pytest.mark.slow
def test_bench_export_times_what_is_right_and_writes_a_table_and_a_picture(monkeypatch, tmp_path, capsys):
    def export_another(model, file):
        """Of the second model other weights, whose logits are not eager's."""
        return export_onnx(model if type(model) is first else timm.create_model("test_agent_deit"), file)

    first = type(timm.create_model("test_efficientvit_cga"))
    monkeypatch.setattr(exported, "export_onnx", export_another)
    out = tmp_path / "new" / "speed.csv"
    assert main(["bench", "export", "--models", "test_efficientvit_cga", "test_agent_deit", "--forms", "autocast",
                 "onnxruntime", "onnxruntime_int8", "--threads", "1", "--repeat", "1", "--out", str(out)]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["form"], row["note"]) for row in rows] == [
        ("test_efficientvit_cga", "eager", ""), ("test_efficientvit_cga", "autocast", ""),
        ("test_efficientvit_cga", "onnxruntime", ""), ("test_efficientvit_cga", "onnxruntime_int8", rows[3]["note"]),
        ("test_agent_deit", "eager", ""), ("test_agent_deit", "autocast", ""),
        ("test_agent_deit", "onnxruntime", "wrong result"), ("test_agent_deit", "onnxruntime_int8", "wrong result")]
    assert re.fullmatch(r"error 0\.0\d\d, 0 of \d+ layers float", rows[3]["note"])
    for row in rows[6:]:
        assert row["latency_ms"] == row["peak_mib"] == ""
    limits = {"eager": 1e-4, "autocast": 0.1, "onnxruntime": 1e-4, "onnxruntime_int8": 0.2}
    for row in rows[:6]:
        assert float(row["latency_ms"]) > 0
        assert float(row["difference"]) < limits[row["form"]]
        assert 20 < float(row["peak_mib"]) < 4096
    assert float(rows[1]["difference"]) > 1e-4  # it is no float32
    eager, _, onnx, int8 = rows[:4]
    assert 0 < float(int8["disk_mib"]) < float(onnx["disk_mib"]) / 2
    assert (eager["latency_over_eager"], eager["batch_over_eager"]) == ("1", "1")
    ratio = float(onnx["latency_ms"]) / float(eager["latency_ms"])
    assert float(onnx["latency_over_eager"]) == pytest.approx(ratio, rel=1e-2)
    weights = sum(x.nbytes for x in timm.create_model("test_efficientvit_cga").state_dict().values()) / 2**20
    assert float(eager["disk_mib"]) == pytest.approx(weights, rel=1e-3)
    assert weights / 2 < float(onnx["disk_mib"]) < weights + 1
    assert out.with_suffix(".png").stat().st_size > 10000
    assert "wrong result" in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured tables -->\nold\n<!-- end of measured tables -->\nafter\n")
    subprocess.run([sys.executable, TOOLS / "write_measured_tables.py", out, page], check=True)
    text = page.read_text()
    assert "| model | eager | autocast | onnxruntime | onnxruntime_int8 |" in text
    assert f"{onnx['latency_ms']}; {onnx['images_per_s']} ({onnx['latency_over_eager']}" in text


def test_bench_export_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "export", "--models", "no_such_model"])
    assert "no model is called no_such_model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no form is called tensorrt"):
        bench.benchmark_export("test_dinat", ["tensorrt"])


def test_the_tool_is_the_command():
    done = subprocess.run([sys.executable, TOOLS / "benchmark_ops.py", "--help"], text=True, capture_output=True,
                          check=True, cwd=TOOLS.parent, env=os.environ | {"PYTHONPATH": str(TOOLS.parent)})
    assert "--compiled" in done.stdout


def test_steps_of_training_are_timed_by_their_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "BESIDE", "test_vit")
    out = tmp_path / "train.csv"
    assert main(["bench", "train", "--models", "test_dinat", "test_vit", "--image-size", "64", "--batch", "2",
                 "--checkpointed", "--repeat", "1", "--threads", "1", "--out", str(out)]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    forms = [(name, form, "") for name in ("test_dinat", "test_vit") for form in ("eager", "attention", "blocks")]
    assert [(row["model"], row["form"], row["note"]) for row in rows] == forms
    eager, attention, blocks = (float(row["peak_mib"]) for row in rows[:3])
    assert eager > attention > blocks
    ours, peer = rows[0], rows[3]
    assert int(ours["parameters"]) == sum(x.numel() for x in timm.create_model("test_dinat").parameters())
    for row in (ours, peer):
        parts = [float(row[f"{part}_ms"]) for part in ("forward", "backward", "optimizer")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(float(row["step_ms"]), rel=1e-2)
        assert float(row["images_per_s"]) == pytest.approx(2000 / float(row["step_ms"]), rel=1e-2)
        assert float(row["peak_mib"]) > 0
        assert float(row["data_ms"]) > 0
    assert "test_dinat" in capsys.readouterr().out


def test_a_model_without_gradients_is_not_timed(monkeypatch):
    monkeypatch.setattr(training, "BESIDE", "test_vit")
    create = timm.create_model

    def broken(name, **kwargs):
        model = create(name, **kwargs)
        if name == "test_dinat":
            model.head.register_parameter("unused", torch.nn.Parameter(torch.zeros(3)))
        return model

    monkeypatch.setattr(timm, "create_model", broken)
    row, = bench.benchmark_training("test_dinat", 1, 64, 1)
    assert row["note"] == "test_dinat: no finite gradient of head.unused"
    assert row["step_ms"] == ""
    assert row["runs"] == 0


@pytest.mark.slow
def test_a_compiled_step_is_compared_with_the_eager_one(monkeypatch):
    monkeypatch.setattr(training, "BESIDE", "test_vit")
    with monkeypatch.context() as strict:
        strict.setattr(training, "_TOLERANCE", -1.0)
        assert "wrong result" in bench.benchmark_training("test_dinat", 2, 32, 1, compiled=True)[1]["note"]
    rows = bench.benchmark_training("test_dinat", 2, 64, 1, compiled=True)  # whatever was compiled before
    assert [(row["form"], row["note"]) for row in rows] == [("eager", ""), ("compiled", "")]
    assert all(float(row["step_over_swin_tiny"]) > 0 for row in rows)
