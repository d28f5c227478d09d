"""Benchmarks: suites of runs, studies of one question, the core's speed, the gallery of kernels."""

__all__: list[str] = []
