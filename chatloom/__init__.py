"""Chatloom: an RLHF pipeline as one reproducible, tracked DAG."""
