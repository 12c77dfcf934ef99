"""What is looked at before, at the start and at the end of a run."""
