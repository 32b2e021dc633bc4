"""The benchmark of attention in patterns: efficiency lengths against the authors', the prefix test, the command."""
import csv
import functools
import math

import pytest
import torch
import torch.nn.functional as F

from tests import golden
from tests.tools import load_tool
from visionattn.bench import attention, attention_command
from visionattn.bench.attention import benchmark_attention, prefix_difference
from visionattn.bench.attention_peers import PEERS, attention_peer
from visionattn.bench.efficiency import compositional_index, efficiency_length
from visionattn.cli import main
from visionattn.ops import Case, dispatch
from visionattn.ops.case import CAUSAL, CROSS, PATTERNS, square
from visionattn.ops.combiner import cases as combiner_cases
from visionattn.ops.combiner.naive import entries

GOLDEN = golden.load("cab")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


def points(function):
    return {n: float(function(n)) for n in LENGTHS}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_efficiency_lengths_are_the_authors(case):
    full, efficient = (dict(zip(map(int, GOLDEN["lengths"]), case[name], strict=True))
                       for name in ("full", "efficient"))
    found = efficiency_length(full, efficient, case["skip_first"])
    assert found.length == pytest.approx(case["efficiency_length"], rel=1e-9)
    # A constant near zero is the rest of large numbers that cancel out.
    assert found.quadratic == pytest.approx(case["quadratic"], rel=1e-9, abs=1e-9)
    assert found.linear == pytest.approx(case["linear"], rel=1e-9, abs=1e-9)
    assert (found.r2_full, found.r2_efficient) == pytest.approx((case["r2_full"], case["r2_efficient"]), rel=1e-9)
    assert found.summary == (f"{case['efficiency_length']:.0f}" if case["efficiency_length"] > 256 else "< 256")


@pytest.mark.parametrize("case", GOLDEN["compositional_index"])
def test_compositional_index_is_the_authors(case):
    options = (case["mu"], case["sigma"], case["higher_is_better"])
    assert compositional_index(case["scores"], *options, case["tasks"]) == pytest.approx(case["index"], rel=1e-9)
    tasks = [compositional_index(case["scores"], *options, [task]) for task in case["tasks"]]
    assert tasks == pytest.approx(case["task_scores"], rel=1e-9)
    with pytest.raises(ValueError, match="deviation must be positive"):
        compositional_index([1.], [1.], [0.], [True], [[0]])


@pytest.mark.parametrize(("efficient", "length", "summary"), [
    (lambda n: 1000 * n, 1000, "1000"),  # where n^2 = 1000 n
    (lambda n: 100 * n, 100, "< 256"),
    (lambda n: 1e4 * n, 1e4, "> 8192 (extrapolated: 10000)"),
    (lambda n: 0.5 * n - 1e6, 0, "fits do not cross, cheaper"),  # n^2 - n / 2 + 1e6 has no root
    (lambda n: 1e5 * math.log(n), None, "measured"),  # no line fits: the crossing of the measurements
])
def test_efficiency_lengths_of_known_curves(efficient, length, summary):
    full = points(lambda n: n ** 2 + 1e7)
    found = efficiency_length(full, points(lambda n: efficient(n) + 1e7))
    assert summary in found.summary
    if length is None:
        assert found.r2_efficient < 0.95
        assert found.length ** 2 == pytest.approx(1e5 * math.log(found.length), rel=0.3)  # lengths are far between
    else:
        assert found.length == pytest.approx(length, rel=1e-6)


def test_efficiency_lengths_that_there_are_not():
    line, quadratic = points(lambda n: n), points(lambda n: n ** 2)
    found = efficiency_length(line, points(lambda n: 2 * n))
    assert math.isnan(found.length)
    assert found.summary == "dearer, full is not quadratic"
    # Never cheaper: no root; and for a cost of n^3, which no line fits, no crossing but the first.
    assert efficiency_length(points(lambda n: n ** 2 + 1), points(lambda n: n + 1e9)).length > 8192
    assert efficiency_length(quadratic, points(lambda n: n ** 4)).summary == "> 8192 (measured)"
    with pytest.raises(ValueError, match="needs 4 lengths of full attention"):
        efficiency_length({64: 1., 256: 2., 576: 3.}, {64: 1., 256: 2.})
    with pytest.raises(ValueError, match="full attention was not measured at 100 tokens"):
        efficiency_length(quadratic, line | {100: 1.})
    with pytest.raises(ValueError, match="must be positive"):
        efficiency_length(quadratic, line | {256: 0.})


def draw(*spatial):
    return dict(zip("qkv", torch.randn(3, 2, *spatial, 2, 8, dtype=torch.float64), strict=True))


def full(q, k, v, causal=False):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)


def test_prefixes_tell_what_is_causal():
    torch.manual_seed(0)
    line, grid = draw(12), draw(6, 8)
    assert prefix_difference(functools.partial(full, causal=True), line) < 1e-12
    assert prefix_difference(full, line) > 0.1
    assert prefix_difference(full, line, cross=True) < 1e-12  # every query for itself, whatever the keys
    assert prefix_difference(lambda q, k, v: full(q - q.mean(dim=1, keepdim=True), k, v), line, cross=True) > 0.1
    windows = functools.partial(attention.operations.neighborhood_attention, kernel_size=3)
    assert prefix_difference(functools.partial(windows, is_causal=True), grid) < 1e-12
    assert prefix_difference(functools.partial(windows, is_causal=(True, False)), grid) > 0.1
    assert prefix_difference(windows, grid) > 0.1


def test_an_attention_that_looks_ahead_is_not_timed(monkeypatch):
    """Combiner's causal call without its flag."""
    room = dispatch._OPS["combiner_attention"]
    case = room.pattern_case

    def forgetful(pattern, tokens):
        found = case(pattern, tokens)
        return found._replace(options={**found.options, "causal": False})

    monkeypatch.setattr(room, "pattern_case", forgetful)
    monkeypatch.setattr(attention, "_PREFIXED", 64)
    rows = benchmark_attention("causal_self", ["combiner"], most=64, repeat=1)
    note, = (row["note"] for row in rows if row["op"] == "combiner")
    assert note.startswith("not causal: an output differs by")
    assert all(row["ms"] for row in rows if row["op"] == "full")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rooms_and_peers_say_what_patterns_they_can_do(pattern):
    """Every op has a call of as many queries as asked for, or a reason; peers equal their simplest forms."""
    able = set()
    for name in attention.ATTENTIONS:
        if name in PEERS:
            peer = attention_peer(name, pattern, 100, "cpu")
            inputs, _ = peer.case.tensors(torch.float64)
            assert inputs["k"].shape[1] == (50 if pattern in CROSS else 100)
            if name != "flex":
                torch.testing.assert_close(peer.run(**inputs), peer.naive(**inputs), atol=1e-9, rtol=1e-9)
            if pattern in CAUSAL and name == "linear":
                assert prefix_difference(peer.run, inputs, pattern in CROSS) < 1e-9
        elif name != "natten":
            case = dispatch.pattern_case(f"{name}_attention", pattern, 64)
            assert case if isinstance(case, str) else case.pairs
            if isinstance(case, Case):
                able.add(name)
                out = getattr(attention.operations, f"{name}_attention")(**case.arguments())
                assert math.prod(out.shape[1:-2]) == 64
    assert able == {
        "noncausal_self": {name for name in attention.ATTENTIONS if name not in (*PEERS, "natten")},
        "causal_self": {"combiner", "flow", "neighborhood"},
        "noncausal_cross": {"agent", "factorized", "flow", "reversed", "routed", "sparsified"},
        "causal_cross": {"factorized"},
    }[pattern]


def test_pairs_of_causal_windows_are_counted_without_lists():
    for columns, length in ((1024, 32), (1030, 50)):
        sizes = (1, columns), (1, length)
        assert combiner_cases._pairs("window", *sizes, True) == entries("window", *sizes, True)
    with pytest.raises(ValueError, match="a square number of tokens, not 65"):
        square(65)


def test_the_middle_half():
    assert attention._middle_half([5.]) == 5
    assert attention._middle_half([1., 2., 90.]) == 2
    assert attention._middle_half([9., 1., 2., 3., 100., 4., 5., 6.]) == pytest.approx((3 + 4 + 5 + 6) / 4)


def test_runs_are_spread_over_those_of_others():
    order = []
    works = {name: functools.partial(order.append, name) for name in "ab"}
    found = attention._take_turns(works, {"a": 6, "b": 3}, {"a": 1., "b": 1.}, "cpu")
    assert {name: len(runs) for name, runs in found.items()} == {"a": 6, "b": 3}
    assert "".join(order) == "abaabaaba"


def test_what_would_take_too_long_or_too_much_is_left_out():
    before = [{"tokens": n, "ms": "1", "processor_s": n ** 2 / 1e6, "peak_mib": n ** 2 / 1e5, "note": ""}
              for n in (2304, 4096)]
    assert attention._too_large(before, 9216, "cpu") == "left out: a run would take about 85 s"
    assert not attention._too_large(before, 4096, "cpu")
    small = [row | {"processor_s": 0.1, "peak_mib": row["tokens"] ** 2 / 5e3} for row in before]
    assert attention._too_large(small, 9216, "cpu") == "left out: a run would take about 17 GiB"
    assert attention._too_large([*before, {"ms": "", "note": "no backward pass"}], 9216, "cpu") == "no backward pass"


def test_bench_attention_writes_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention_command, "measure_machine", machine)
    out = tmp_path / "new" / "attention.csv"
    assert main(["bench", "attention", "--patterns", "noncausal_self", "noncausal_cross", "--ops", "flow", "kmeans",
                 "--max", "256", "--repeat", "1", "--threads", "1", "--out", str(out)]) == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    series = {(row["pattern"], row["op"], row["direction"]) for row in rows if row["ms"]}
    assert len(series) == 2 * 2 * 2 + 2
    assert {row["note"] for row in rows if not row["ms"]} == {"a cluster's queries and keys are of one sequence"}
    for row in rows:
        if row["ms"]:
            assert row["tokens"] in ("64", "256")
            assert row["keys"] == (str(int(row["tokens"]) // 2) if "cross" in row["pattern"] else row["tokens"])
            assert float(row["peak_mib"]) > 0
            assert not row["note"]
    flops = {row["op"]: float(row["mflop"]) for row in rows
             if (row["pattern"], row["direction"], row["tokens"]) == ("noncausal_self", "forward", "256")}
    assert flops["full"] == pytest.approx(4 * 64 * 8 * 256 ** 2 / 1e6, rel=1e-3)
    printed = capsys.readouterr().out
    assert "Noncausal cross attention, forward+backward" in printed
    assert "kmeans: a cluster's queries and keys are of one sequence" in printed

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- attention -->\nold\n<!-- end of attention -->\nafter\n")
    load_tool("write_measured_tables").write_measured_tables(out, page)
    text = page.read_text()
    assert text.startswith("before\n<!-- attention -->\n")
    assert "old" not in text
    assert next(row["ms"] for row in rows if row["op"] == "flow") in text


def machine(device, dtype):
    return attention.Machine({"device": device, "machine": "a CPU", "driver": "", "threads": 1, "torch": "2",
                              "date": "2026"}, 1e10, 1e11)


def test_bench_attention_refuses_what_it_cannot_do(capsys):
    for arguments in (["--max", "63"], ["--patterns", "sideways"], ["--ops", "no_such"]):
        with pytest.raises(SystemExit):
            main(["bench", "attention", *arguments])
    assert "--max 63: the shortest length is 64 tokens" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_attention_is_right_in_every_pattern(dtype, monkeypatch):
    """All that a room says it can do is done, forward and backward, or has one of the known reasons."""
    monkeypatch.setattr(attention, "_SECONDS", 0.)
    monkeypatch.setattr(attention, "_FEWEST", 1)
    for pattern in PATTERNS:
        for row in benchmark_attention(pattern, most=1024 if dtype == torch.float32 else 64, dtype=dtype):
            assert row["ms"] or row["op"] in ("flex", "natten") or not row["direction"], row
            assert "not causal" not in row["note"]
            assert "wrong result" not in row["note"]
            if row["op"] != "full" and row["ms"] and dtype == torch.float32:
                assert row["time_length"]
