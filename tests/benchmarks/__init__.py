"""Benchmarks as functions: `run_baseline_benchmark(create_mlp(), BenchmarkConfig())`."""

from tests.benchmarks.running import BenchmarkConfig, BenchmarkResult, run_baseline_benchmark

__all__ = ["BenchmarkConfig", "BenchmarkResult", "run_baseline_benchmark"]
