"""The same functions, faster: compiled blocks, fused layers, kernels."""
