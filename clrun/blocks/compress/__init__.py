"""Compression of the weights of a network: low rank, sparse, quantised."""
