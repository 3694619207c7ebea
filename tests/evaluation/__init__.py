"""Tests of attacks, diagnostics, tables."""
