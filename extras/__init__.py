"""Commands beside the stages: preflight, cells, distill, make_checkpoints. `python -m extras.NAME ...`"""
