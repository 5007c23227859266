"""The process that holds weights: the only code that imports torch. Started as `python -m engine`."""
