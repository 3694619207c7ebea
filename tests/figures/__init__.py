"""Tests of features and figures."""
