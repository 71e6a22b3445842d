"""Hyper-parameter search with Ray Tune: what a trial is made of, search files, and the driver of `modip tune`. `modip_ray.tune` has the Trainable."""
