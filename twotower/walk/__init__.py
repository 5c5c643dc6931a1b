"""The walk over a model's layers: batches, views of layers, readout, and proof."""
