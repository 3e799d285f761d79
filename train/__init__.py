"""The programs: run from a checkout, not part of the wheel."""
