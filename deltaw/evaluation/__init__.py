"""How well a model does: losses, metrics, what was forgotten."""
