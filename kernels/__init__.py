"""Pure functions of tensors, each with a torch twin in `reference`."""
