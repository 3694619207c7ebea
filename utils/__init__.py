"""Everything that two scripts share."""
