"""CUDA graphs: captured passes, their inputs and gradients."""
