"""Adapters that come from elsewhere: received, checked, stored."""
