"""One singleton a file: constructors take clock, probes, clients and store; a cached getter stands below."""
