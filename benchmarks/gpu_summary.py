"""What `gpu_proof` found, as Markdown."""

from __future__ import annotations

import statistics
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import gpu_goals, report
from .results import Report

Findings = list[dict[str, Any]]


def told(outcomes: Sequence[Any]) -> str:
    """What became of the units of a part, in a few words."""
    counted = Counter(outcome.status for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    return ", ".join(f"{count} {status}" for status, count in counted.items()) + f", {seconds:.0f} s of work"


def counts(path: Path) -> dict[str, Any]:
    """Tests passed, skipped and failed by a JUnit file of pytest, the failed by name; empty where there is none."""
    if not path.exists():
        return {}
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    found = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    bad += [case.get("name") for case in suite.iter("testcase") if case.find("error") is not None]
    return {**found, "failed": bad}


def markdown(proof: Mapping[str, Any], benches: Mapping[str, Report], words: Mapping[str, str]) -> str:
    environment = proof["environment"]
    titles = {
        "bench": "without tuning", "tuned": "tuned", "cuda_bench": "CUDA C++", "compilers": "beside compilers, tuned",
    }  # fmt: skip
    measured = {titles[name]: whole for name, whole in benches.items() if whole.rows}
    parts = [
        f"# {environment['GPU']}, {environment['date'][:10]}, commit {environment['commit']}",
        f"`{proof['command']}`",
        _environment(environment),
        _parts(proof["parts"], words),
        _checks("Checks", proof["findings"].get("check", [])),
        _checks("Checks of the CUDA C++ kernels", proof["findings"].get("cuda_check", [])),
        _tests(proof["tests"]),
        gpu_goals.markdown({title: whole.rows for title, whole in measured.items()}),
        _first_calls(proof["findings"].get("first_call", [])),
        _untimed(proof["findings"]),
    ]
    for title, whole in measured.items():
        partial = f" ({whole.partial()})" if whole.partial() else ""
        parts.append(f"## Benchmark, {title}{partial}\n\n{report.GPU_LEGEND}\n\n{report.markdown(whole.rows)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _environment(environment: Mapping[str, Any]) -> str:
    lines = [f"- {name}: {value}" for name, value in environment.items() if name != "peaks"]
    for name, rate in environment.get("peaks", {}).items():
        lines.append(f"- measured {name}: {rate / 1e12:.3g} {'TB/s' if name == 'copy' else 'TFLOP/s'}")
    return "\n".join(lines)


def _parts(parts: Mapping[str, list[dict[str, Any]]], words: Mapping[str, str]) -> str:
    lines = ["| part | | units | |", "|---|---|---|---|"]
    for name, outcomes in parts.items():
        counted = Counter(outcome["status"] for outcome in outcomes)
        bad = [outcome for outcome in outcomes if outcome["status"] != "done"]
        which = "; ".join(f"{_unit(outcome['unit'])} {outcome['status']}" for outcome in bad)
        lines.append(f"| {name} | {words[name]} | {counted['done']} of {len(outcomes)} done | {which} |")
    return "\n".join(lines)


def _unit(unit: Mapping[str, Any]) -> str:
    return " ".join(str(value) for name, value in unit.items() if name != "part") or unit["part"]


def _checks(title: str, findings: Findings) -> str:
    if not findings:
        return ""
    checks = list(dict.fromkeys(finding["check"] for finding in findings))
    lines = [f"| op | {' | '.join(checks)} | worst error / allowed |", "|---" * (len(checks) + 2) + "|"]
    for op in dict.fromkeys(finding["op"] for finding in findings):
        cells = []
        for check in checks:
            members = [f for f in findings if (f["op"], f["check"]) == (op, check)]
            good = sum(f["complaint"] is None for f in members)
            cells.append(f"{good} of {len(members)}" if members else "-")
        ratios = [f["error"] / f["allowed"] for f in findings if f["op"] == op and f["error"] is not None]
        lines.append(f"| {op} | {' | '.join(cells)} | {f'{max(ratios):.2f}' if ratios else '-'} |")
    notes = [f"- {_where(f)}, {f['check']}: {f['complaint']}" for f in findings if f["complaint"]]
    declined = dict.fromkeys(f"- {_where(f)} was declined: {f['declined']}" for f in findings if f["declined"])
    return "\n".join([f"## {title}\n", *lines, "", *notes, *declined])


def _where(finding: Mapping[str, Any]) -> str:
    return f"{finding['op']}, {finding['case']}, {finding['dtype']}"


def _first_calls(findings: Findings) -> str:
    if not findings:
        return ""
    lines = ["## First calls, forward and backward\n", "| op | case | | seconds |", "|---|---|---|---|"]
    for f in findings:
        lines.append(f"| {f['op']} | {f['case']} | {f['check']} | {f['seconds']:.3f} |")
    times = [f["seconds"] for f in findings if f["check"].startswith("first")]
    return "\n".join([*lines, "", f"First calls: median {statistics.median(times):.3f} s, longest {max(times):.3f} s."])


def _untimed(findings: Mapping[str, Findings]) -> str:
    """What the calls that compile and tune had to say."""
    complaints = [(part, f) for part in ("warm", "tune") for f in findings.get(part, []) if f["complaint"]]
    return "\n".join(f"- {part}: {_where(f)}: {f['complaint']}" for part, f in complaints)


def _tests(tests: Mapping[str, dict[str, Any]]) -> str:
    if not tests:
        return ""
    lines = ["## Tests\n", "| room | tests | failed | skipped | |", "|---|---|---|---|---|"]
    for room, found in tests.items():
        if not found:
            lines.append(f"| {room} | no report: see log.txt | | | |")
            continue
        failed = found["failures"] + found["errors"]
        lines.append(f"| {room} | {found['tests']} | {failed} | {found['skipped']} | {', '.join(found['failed'])} |")
    return "\n".join(lines)
