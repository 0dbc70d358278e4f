"""Measurements. Each file runs by itself and writes one JSON with device, versions and commit."""

import os

# What is measured is Kitsune: the gate would leave steps to eager, some of them to measure them (`bench_gate` switches it on).
os.environ.setdefault("KITSUNE_GATE", "0")
