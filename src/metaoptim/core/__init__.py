"""What everything else stands on: types, arithmetic on trees, gradients, losses, objectives."""
