"""The label of tokens that are not trained."""

IGNORED = -100  # ignore_index of torch's cross_entropy, and of transformers' models
