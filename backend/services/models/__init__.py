"""Models on this machine and on the Hub: their files, their facts, what prevents a load, and whether they fit."""
