"""Faster versions of the same functions: compiled blocks, fused layers, kernels."""
