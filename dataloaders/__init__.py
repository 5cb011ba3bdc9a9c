"""Case sources (one file per format), splits, samplers and transforms."""
