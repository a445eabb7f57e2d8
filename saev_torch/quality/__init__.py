"""How well batches mix: measured in a batch, predicted for a configuration, drawn."""
