"""A run's policy behind HTTP: `modip serve RUN`."""
