"""Run the numerical tests as they would run on other processors, and print one table.

The libraries below torch, numpy and SciPy choose their kernels by the processor that they find. Variables make them
use those of an older one, whose results differ in the last bits: what passes under all of them does not depend on where
it was written. Words on the command line go to pytest; folders among them replace the numerical ones.

    python tests/cpus.py
    python tests/cpus.py -n 2 tests/projection
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
#: Rooms whose tests compute; the others test files, words and processes.
NUMERICAL = (
    "tests/projection",
    "tests/ntk",
    "tests/rl",
    "tests/continual",
    "tests/bench/speed/test_speed.py",
    "tests/bench/suites/test_statistics.py",
)
#: Threads that wait for one another without spinning: the processes of pytest share the cores.
TWO = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
#: Torch's own kernels, MKL's (matrices of torch; the first two variables only reach it on Intel's processors), oneDNN's
#: (convolutions) and OpenBLAS's (numpy and SciPy).
SETTINGS: dict[str, dict[str, str]] = {
    "1 thread": {},
    "2 threads": TWO,
    "MKL AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "torch AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "torch default": {"ATEN_CPU_CAPABILITY": "default"},
    "all AVX2": {
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "all oldest, 2 threads": {
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "Nehalem",
        **TWO,
    },
    "sums reversed": {"PYTEST_PLUGINS": "tests.reversed_sums"},
}
#: What the settings set, and what a run must therefore not inherit.
VARIABLES = {name for setting in SETTINGS.values() for name in setting}


def run(setting: dict[str, str], words: list[str]) -> tuple[dict[str, int], list[str]]:
    """Counts of outcomes under a setting, and the names of the tests that failed."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", **setting}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--tb=short", f"--junitxml={report}", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        if not report.is_file():
            raise SystemExit(f"pytest came to no result:\n{done.stdout}")
        cases = ElementTree.parse(report).getroot().iter("testcase")
    outcomes = [(case.get("classname", ""), case.get("name", ""), {child.tag for child in case}) for case in cases]
    failed = [f"{where}::{name}" for where, name, tags in outcomes if tags & {"failure", "error"}]
    if failed:
        print(done.stdout)
    skipped = sum("skipped" in tags for _, _, tags in outcomes)
    return {"passed": len(outcomes) - len(failed) - skipped, "failed": len(failed), "skipped": skipped}, failed


def main(words: list[str]) -> int:
    """Run all settings; 1 where a test failed under any."""
    if not any((ROOT / word.partition("::")[0]).exists() for word in words):
        words = [*words, *NUMERICAL]
    rows, failures = [], {}
    for name, setting in SETTINGS.items():
        counts, failures[name] = run(setting, words)
        rows.append((name, counts))
        print(f"{name}: {counts['passed']} passed, {counts['failed']} failed", file=sys.stderr, flush=True)
    print(f"\n{'setting':<24}{'passed':>8}{'failed':>8}{'skipped':>9}  variables")
    for name, counts in rows:
        variables = " ".join(f"{key}={value}" for key, value in SETTINGS[name].items())
        print(f"{name:<24}{counts['passed']:>8}{counts['failed']:>8}{counts['skipped']:>9}  {variables}".rstrip())
    for name, tests in failures.items():
        for test in tests:
            print(f"failed with {name}: {test}")
    return int(any(failures.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
