"""Scores: bounds of the likelihood, enhancement, sample quality, out-of-distribution detection, time."""
