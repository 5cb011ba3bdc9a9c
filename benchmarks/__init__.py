"""Measurements of speed and accuracy; each is a script that prints medians, ratios and versions."""
