"""The services. A file here is a door: one public service, with the getter of the process's one instance below it.

Behind the doors lie rooms by subject. A door and a room see the layers below them and nothing above: pyproject.toml
lists the layers, and docs/decisions/0012-rooms.md says why they are what they are. Constructors take clock, probes,
clients and store.
"""
