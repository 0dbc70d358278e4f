"""Measurements. Each file runs by itself and writes one JSON with device, versions and commit."""
