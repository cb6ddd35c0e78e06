"""Engines: a problem (one prompt, its noise, its cells) to probabilities.

`plain` runs one forward pass per cell, as the paper's code does; `one_pass` runs a whole grid in a few. Both take a
`Problem` and return `Answers`, and must agree.
"""
