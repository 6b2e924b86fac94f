"""A transformers model as it is trained and sampled from: loaded, recognised, run on packs."""
