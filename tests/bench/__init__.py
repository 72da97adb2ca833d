"""Measurements behind the README's numbers: programs to run by hand, not tests."""
