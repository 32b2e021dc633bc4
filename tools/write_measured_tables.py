"""Writes what ``visionattn bench ops|attention|export|kernels`` found as Markdown tables into a page, between marks.

    python tools/write_measured_tables.py results/ops_cpu.csv docs/kernels.md
    python tools/write_measured_tables.py results/attention_cpu.csv docs/kernels.md
    python tools/write_measured_tables.py results/export_speed_cpu.csv docs/export.md
    python tools/write_measured_tables.py results/kernels.csv docs/kernels.md
"""
import sys
from pathlib import Path

from rows import read_rows, write_between

from visionattn.bench.attention_command import attention_blocks

__all__ = ["write_measured_tables"]

MARKS = "<!-- measured tables -->", "<!-- end of measured tables -->"
ATTENTION = "<!-- attention -->", "<!-- end of attention -->"
KERNELS = "<!-- compiled kernels -->", "<!-- end of compiled kernels -->"


def write_measured_tables(source: Path, page: Path) -> None:
    """Replaces what is between the marks of ``page`` by the tables made from the CSV file ``source``.

    Raises:
        ValueError: The page lacks the marks.
    """
    rows = read_rows(source)
    marks = KERNELS if "registers" in rows[0] else ATTENTION if "pattern" in rows[0] else MARKS
    write_between(page, *marks, [_tables(rows)])


def _tables(rows: list[dict[str, str]]) -> str:
    if "form" in rows[0]:
        return _exported(rows)
    if "registers" in rows[0]:
        return _compiled(rows)
    if "pattern" in rows[0]:
        return _attention(rows)
    blocks = []
    for op, direction in dict.fromkeys((row["op"], row["direction"]) for row in rows):
        chosen = [row for row in rows if (row["op"], row["direction"]) == (op, direction)]
        blocks.append(f"{op.capitalize()} attention, {direction}, {chosen[0]['dtype']}, {_machine(chosen[0])}. "
                      "Median milliseconds, in brackets peak MiB:\n\n" + _table(chosen))
    return "\n\n".join(blocks)


def _exported(rows: list[dict[str, str]]) -> str:
    forms = [form for form in dict.fromkeys(row["form"] for row in rows)
             if any(row["latency_ms"] for row in rows if row["form"] == form)]
    lines = [["model", *forms], ["---"] * (1 + len(forms))]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = {row["form"]: "{latency_ms}; {images_per_s} ({latency_over_eager}, {batch_over_eager}); {peak_mib}; "
                 "{disk_mib}".format(**row) for row in rows if row["model"] == model and row["latency_ms"]}
        lines.append([model, *(cells.get(form, "-") for form in forms)])
    row = rows[0]
    libraries = ", ".join(f"{name} {row[name]}" for name in ("torch", "timm", "onnxruntime", "openvino"))
    return (f"{row['machine']}, {row['threads']} threads, {libraries}, {row['date']}. Milliseconds of one image; "
            "images a second in batches of 8 (both times as multiples of eager's); peak MiB; MiB on disk:\n\n"
            + "\n".join(f"| {' | '.join(line)} |" for line in lines))


def _compiled(rows: list[dict[str, str]]) -> str:
    columns = list(dict.fromkeys((row["target"], row["dtype"]) for row in rows))
    lines = [["op, case", "kernel", *(f"{target} {dtype}" for target, dtype in columns)], ["---"] * (2 + len(columns))]
    for op, case, kernel in dict.fromkeys((row["op"], row["case"], row["kernel"]) for row in rows):
        cells = {(row["target"], row["dtype"]): "{registers}, {spilled_bytes}, {blocks_per_sm}".format(**row)
                 for row in rows if (row["op"], row["case"], row["kernel"]) == (op, case, kernel)}
        lines.append([f"{op.removesuffix('_attention')} {case}", kernel.removesuffix("_kernel").replace("_", " "),
                      *(cells.get(column, "-") for column in columns)])
    return (f"Triton {rows[0]['triton']}. Registers and spilled bytes of a thread, blocks that an SM holds:\n\n"
            + "\n".join(f"| {' | '.join(line)} |" for line in lines))


def _attention(rows: list[dict[str, str]]) -> str:
    blocks = [f"{_machine(rows[0])}; {rows[0]['dtype']}. Milliseconds, in brackets peak MiB:"]
    cannot: dict[str, None] = {}
    for title, (head, *lines), reasons in attention_blocks(rows):
        blocks += [f"{title}:", "\n".join(
            f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])]
        pattern, _, direction = title.partition(" attention, ")
        cannot |= dict.fromkeys(
            f"- {name}, {pattern.lower()}" + (f", {direction}" if "backward" in reason else "") + f": {reason}"
            for name, reason in reasons.items())
    return "\n\n".join([*blocks, "Not measured:", "\n".join(cannot)])


def _machine(row: dict[str, str]) -> str:
    driver = f", driver {row['driver']}" if row.get("driver") else ""
    libraries = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "natten") if row.get(name))
    rates = f", {row['gb_per_s']} GB/s, {row['gflop_per_s']} GFLOP/s" if row.get("gb_per_s") else ""
    return f"{row['machine']}{driver}, {row['threads']} threads{rates}, {libraries}, {row['date']}"


def _table(rows: list[dict[str, str]]) -> str:
    backends = [name for name in dict.fromkeys(row["backend"] for row in rows)
                if any(row["median_ms"] for row in rows if row["backend"] == name)]
    has_dense = any(row["simulated_speedup"] for row in rows)
    head = ["shape", "window", *backends, "bound: bytes, FLOPs"]
    head += ["speed-up over dense, simulated"] if has_dense else []
    lines = [head, ["---"] * len(head)]
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["backend"]: row for row in rows if row["case"] == case}
        # The first backend of a case is ours, the one that the other columns are for.
        ours = next(iter(of_case.values()))
        cells = [ours["shape"], ours["window"], *(_cell(of_case.get(name)) for name in backends)]
        cells += [f"{ours['bytes_ms']}, {ours['flops_ms']}"]
        cells += [f"{ours['speedup_over_dense'] or '-'}, {ours['simulated_speedup']}"] if has_dense else []
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, str] | None) -> str:
    return f"{row['median_ms']} ({row['peak_mib']})" if row and row["median_ms"] else "-"


if __name__ == "__main__":
    write_measured_tables(*map(Path, sys.argv[1:3]))
