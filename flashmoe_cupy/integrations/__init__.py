"""Modules for host frameworks. Those for transformers have one `register()` each and the host versions that they were
tested with; `transformers_models` says which models can use them, and refuses the others.

`flash_attn` and `sdpa` have the functions of flash-attn and torch, with their own arguments, for code that changes one
import. `torch_rows` is what the two share.
"""
