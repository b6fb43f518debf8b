"""Mixtures of experts: which problems there are, of which launches they are made, and in what tiles."""
