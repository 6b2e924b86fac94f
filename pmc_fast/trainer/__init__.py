"""PMC as a transformers Trainer, with its checkpoints."""
