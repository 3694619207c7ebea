"""Programs beside the tests: benchmarks, the study, the card."""
