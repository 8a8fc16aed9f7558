"""Measures a deployment through HTTP, compares two measurements, judges aggregated against disaggregated."""
