"""Segmentation networks; each returns logits together with its last decoder features."""
