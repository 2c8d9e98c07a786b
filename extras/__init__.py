"""Commands beside the stages: preflight, cells, distill. `python -m extras.NAME ...`"""
