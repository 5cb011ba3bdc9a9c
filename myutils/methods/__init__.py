"""Training methods, one file each; the trainer never asks which one it runs."""
