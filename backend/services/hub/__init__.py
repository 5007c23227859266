"""The way to the Hub: its requests, its answers kept, its files brought into the cache."""
