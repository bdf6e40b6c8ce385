"""Image classifiers: the backend, models, splits and metrics. Nothing of diffusion is imported here."""
