"""The record of a run and the numbers computed from it: metrics, order robustness, comparisons."""
