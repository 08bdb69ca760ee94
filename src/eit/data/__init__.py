"""Images on disk -> batches on the device."""
