"""Triton kernels for attention over pages. Importing anything here imports triton."""
