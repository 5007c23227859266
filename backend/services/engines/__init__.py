"""Engine processes: they are started by name and take the commands of domain/protocol.py."""
