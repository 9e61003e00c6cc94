"""Target profiles: what a device is, as data."""
