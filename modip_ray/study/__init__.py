"""Methods x tasks x seeds, each a resumable run, and the tables and curves they come to."""
