"""The parts of tools/evaluate_suite.py."""
