"""Images: files, data sets, batches, sheets."""
