"""What the kernels are held to, as ratios within one run, and whether a run met it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from harness import print_table

FOUR_BITS = ("nf4", "int4-g64", "int4-g128")
LEAST_RISE = 0.97  # of the time from one M to the next larger: 3 % are measurement
Record = dict[str, Any]
Goal = dict[str, Any]


def goal(what: str, case: str, need: float, got: float | None, most: bool = False) -> Goal:
    """`got` at least `need` (`most`: at most); None where the run had nothing to compare with."""
    met = None if got is None else bool(got <= need if most else got >= need)
    number = f"{need:.3g}" if need < 1000 else f"{need:.0f}"
    return {"goal": what, "case": case, "need": f"{'≤' if most else '≥'} {number}", "got": got, "met": met}


def _ratio(of: Iterable[Record], to: Record) -> float | None:
    """How many times faster `to` is than the fastest of `of`."""
    return min((r["seconds"] / to["seconds"] for r in of), default=None)


def linear_goals(records: list[Record]) -> list[Goal]:
    """Goals for the records of one shape."""
    n, k = records[0]["shape"]
    found = []
    for case in dict.fromkeys(r["case"] for r in records if r["kind"] == "bitfold"):
        mine = {r["m"]: r for r in records if r["case"] == case}
        others = {m: [r for r in records if r["m"] == m and r["kind"] != "bitfold"] for m in mine}
        one = next(iter(mine.values()))
        found += {"auto": _exact, "int8": _int8}.get(one["level"], lambda *_: [])(mine, others, one, records)
    return [{"shape": f"{n} x {k}", **g} for g in found]


def _named(others: list[Record], *words: str) -> list[Record]:
    return [r for r in others if any(word in r["case"] for word in words)]


def _exact(
    mine: dict[int, Record], others: dict[int, list[Record]], one: Record, records: list[Record]
) -> list[Goal]:
    """Level auto."""
    case, found = one["case"], []
    if 1 in mine:
        of_bandwidth = mine[1]["of_bandwidth"]
        if one["format"] in FOUR_BITS:
            found += [
                goal("M=1, of read bandwidth", case, 0.85, of_bandwidth),
                goal("M=1, faster than the fastest peer", case, 1.4, _ratio(others[1], mine[1])),
            ]
        elif one["format"].startswith("int8"):
            found.append(goal("M=1, of read bandwidth", case, 0.9, of_bandwidth))
        elif one["format"].startswith(("int3", "int2")):
            nf4 = [
                r
                for r in records
                if (r["m"], r["format"], r["level"], r["activations"], r["layout"])
                == (1, "nf4", "auto", one["activations"], one["layout"])
            ]
            need = 1.15 if one["format"].startswith("int3") else 1.4
            found.append(goal("M=1, faster than nf4", case, need, _ratio(nf4, mine[1])))
    if one["format"] not in FOUR_BITS:
        return found
    if 4 in mine:
        found.append(goal("M=4, faster than the fastest peer", case, 1.4, _ratio(others[4], mine[4])))
    if 16 in mine:
        bitsandbytes = _named(others[16], "bitsandbytes nf4 fp32")
        found += [
            goal("M=16, faster than bitsandbytes fp32", case, 1.4, _ratio(bitsandbytes, mine[16])),
            goal("M=16, against llama.cpp", case, 1.0, _ratio(_named(others[16], "llama.cpp"), mine[16])),
        ]
    small = [mine[m] for m in sorted(mine) if m <= 64]
    if len(small) > 1:
        rise = min(b["seconds"] / a["seconds"] for a, b in pairwise(small))
        found.append(goal("M=1..64, time rises with M", case, LEAST_RISE, rise))
        worst = max(r["times_floor"] for r in small)
        found.append(goal("M=1..64, times the larger floor", case, 1.3, worst, most=True))
    needs = {128: 1.0, 512: 0.97} if one["activations"] == "bf16" else {128: 1.5, 512: 1.5}
    for m, need in needs.items():
        if m in mine:
            dense = f"torch {one['activations']}"
            found.append(
                goal(f"M={m}, against {dense}", case, need, _ratio(_named(others[m], dense), mine[m]))
            )
    return found


def _int8(
    mine: dict[int, Record], others: dict[int, list[Record]], one: Record, records: list[Record]
) -> list[Goal]:
    """Level int8."""
    del records
    if one["format"] not in FOUR_BITS:
        return []
    case, found = one["case"], []
    if 512 in mine:
        ratio = _ratio(_named(others[512], "torch bf16"), mine[512])
        found.append(goal("M=512, against torch bf16", case, 1.6, ratio))
    ratios = {m: _ratio(others[m], mine[m]) for m in mine if m >= 4}
    known = {m: ratio for m, ratio in ratios.items() if ratio is not None}
    if known:
        m = min(known, key=lambda m: known[m])
        found.append(goal(f"M>=4, faster than the fastest peer (least at M={m})", case, 1.3, known[m]))
    return found


def overhead_goals(overhead: dict[str, dict[str, float]]) -> list[Goal]:
    """A 64 x 64 layer at batch 1."""
    needs = {"no_grad": 2.0, "inference_mode": 2.0, "gradients": 3.5}
    return [
        {
            "shape": "64 x 64",
            **goal(f"a call, times nn.Linear's, {mode}", "nf4", need, t["nf4"] / t["nn.Linear"], True),
        }
        for mode, need in needs.items()
        if (t := overhead[mode])
    ]


def solver_goals(records: dict[str, Record]) -> list[Goal]:
    """Seconds for 4096 x 4096 and 8192 rows on two cores, and the loss beside the public algorithm's."""
    reference = records.get("public solve", {}).get("relative_loss")
    loss = None if reference is None else records["solve"]["relative_loss"] / reference
    return [
        goal("Hessian, seconds", "hessian", 1.6, records["hessian"]["median_s"], most=True),
        goal("GPTQ, seconds", "solve", 1.1, records["solve"]["median_s"], most=True),
        goal("GPTQ, loss of the public one's", "solve", 1.0, loss, most=True),
        goal(
            "AWQ scales, seconds", "awq, scale grid", 1.0, records["awq, scale grid"]["median_s"], most=True
        ),
        goal("AWQ clipping, seconds", "awq, clip", 1.0, records["awq, clip"]["median_s"], most=True),
        goal("HQQ, seconds", "hqq", 0.15, records["hqq"]["median_s"], most=True),
    ]


def folding_goals(speeds: dict[str, float], copy: float, clone: float) -> list[Goal]:
    """`speeds` by "quantize <format>" (GB/s of fp32) and "dequantize <format>[ to bf16]" (GB/s moved).

    `copy`: GB/s of fp32 that a copy in place takes in; `clone`: GB/s, read and written, of a copy that, like
    `dequantize`, allocates its result.
    """
    found = []
    for case, speed in speeds.items():
        what, name = case.split(" ", 1)
        if case == "quantize nf4":
            found.append(goal("quantize, GB/s of fp32", name, 14, speed))
            found.append(goal("quantize, of the speed of a copy", name, 14 / 31, speed / copy))
        elif what == "quantize" and name.startswith("int"):
            found.append(goal("quantize with searched scales, GB/s of fp32", name, 3, speed))
        elif what == "dequantize":
            found.append(goal("dequantize, of the bytes that a clone moves", name, 0.8, speed / clone))
    return found


def print_goals(goals: list[Goal], unknown: str = "no peer") -> None:
    """A line per goal; `unknown`: why there is nothing to judge by."""
    words = {True: "met", False: "MISSED", None: unknown}
    rows = [
        [
            g.get("shape", ""),
            g["goal"],
            g["case"],
            g["need"],
            "-" if g["got"] is None else f"{g['got']:.2f}",
            words[g["met"]],
        ]
        for g in goals
    ]
    if rows:
        parts = {"": goals}
        if in_panels := [g for g in goals if "in panels" in g["case"]]:
            parts = {"": [g for g in goals if g not in in_panels], " in panels": in_panels}
        met = ", ".join(
            f"{sum(g['met'] is True for g in p)} of {len(p)} met{name}" for name, p in parts.items()
        )
        print_table(f"goals: {met}", ["shape", "goal", "case", "need", "got", ""], rows)
