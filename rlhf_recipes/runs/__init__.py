"""A training run on disk: its folder, checkpoints, resuming, tracker."""
