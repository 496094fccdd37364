"""What goes in: models, examples, batches, readouts, parameter selections."""
