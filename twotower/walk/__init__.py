"""The walk over a model's layers: batches, layer views, readout and proof."""
