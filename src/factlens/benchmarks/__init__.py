"""Benchmarks of edits: records, and which of their prompts feed which metric."""
