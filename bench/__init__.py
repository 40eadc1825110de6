"""Speed and memory against the peers, and how costs grow: `python -m bench --help`, method in docs/benchmarks.md."""
