"""Tests of settings, files, devices and processes."""
