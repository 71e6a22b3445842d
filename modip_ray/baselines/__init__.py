"""Rival methods, one file each, on MODIP's own parts: they import from model/ only, and agent and learner ask them where the settings say so."""
