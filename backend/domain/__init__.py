"""The rules of the field, pure: no I/O, no torch. The API process and the engine both speak these types."""
