"""Pure parts of the methods on text-to-image diffusion models: functions of tensors and of noise predictions."""
