"""Measures of a frozen encoder: geometry, similarity, probes."""
