"""The parts of `against_peers.py`: contestants, the processes they run in, and the page they fill.

`run_*.py` are the contestants' programs. Each runs in the environment of its peer, so those files,
`harness.py`, `job.py` and `with_jax.py` know nothing of nfflax (but for `run_nfflax.py`) or of
anything else that only this side has.
"""
