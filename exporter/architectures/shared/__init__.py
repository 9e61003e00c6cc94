"""What all families share: the form of a family, and how one is applied to a checkpoint."""
