"""Data preparation: from a source to the batches of each optimizer step, on every rank."""
