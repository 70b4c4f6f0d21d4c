"""Runs functions of tensors as graphs: the only place that uses private or unstable APIs of torch."""
