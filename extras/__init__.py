"""Commands beside the stages; each file says what it does. `python -m extras.NAME ...`"""
