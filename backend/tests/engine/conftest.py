"""torch must be imported the way the engine does."""

from engine.guards import hide_broken_torchvision

hide_broken_torchvision()
