"""How robust a trained network is: attacks, diagnostics, tables."""
