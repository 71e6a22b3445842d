"""Commands on a Ray cluster: submit, follow, cancel, list, fetch the run folder (Ray's Jobs API)."""
