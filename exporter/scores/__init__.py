"""Task scores of a bundle: lm-eval's tasks answered by our own engine, and two tasks that need no network."""
