"""Loss families; each returns a raw float32 scalar, weights are applied in ``StepOutput.total()``."""
