"""The states of jobs and exports, what is recorded of them, and when one is tried again."""
