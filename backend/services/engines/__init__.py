"""Engine processes: started by name, spoken to in the commands of domain/protocol.py."""
