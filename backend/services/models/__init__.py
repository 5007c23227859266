"""Models here and on the Hub: their files, what they are, what is in the way of a load, whether they fit."""
