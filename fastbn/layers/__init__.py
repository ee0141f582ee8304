"""Layers: the verbs with parameters, their gradients and a state."""
