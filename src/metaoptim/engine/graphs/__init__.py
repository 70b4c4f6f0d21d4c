"""Functions of tensors as graphs: the only place that uses private or unstable API of torch."""
