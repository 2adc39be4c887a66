"""The domain: interactions, models, training, evaluation and the command line of slmcompress."""
