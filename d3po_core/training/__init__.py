"""Turn preferences into updates: packing, the loss, the optimizer."""
