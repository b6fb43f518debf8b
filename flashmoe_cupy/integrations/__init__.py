"""Modules for host frameworks, each with one `register()` and the host versions it was tested with.

`transformers_models` says which models of transformers can use the two for transformers, and refuses the others.
"""
