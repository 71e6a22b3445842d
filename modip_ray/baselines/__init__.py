"""Rival methods on MODIP's own parts: the same start, environments, evaluation and run folder. Agent, learner and driver ask them where the settings say so."""
