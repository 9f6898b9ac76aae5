"""Formulas written a second time, slowly and without the library, to judge it by."""
