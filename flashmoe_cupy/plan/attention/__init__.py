"""Attention: which problems there are, which kernels run them, and in what tiles."""
