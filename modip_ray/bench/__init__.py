"""`modip bench`: how fast the parts are, each beside a reference of the same run. One file a group of measurements; run.py is the command."""
