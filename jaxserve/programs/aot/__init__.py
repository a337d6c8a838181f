"""Programs compiled ahead of time: for a device that is not here, kept in a bundle, and described by a report."""
