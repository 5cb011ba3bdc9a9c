"""Training, evaluation and prediction for semi-supervised 3D segmentation."""

__version__ = "0.1.0"
