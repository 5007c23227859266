"""The states of jobs and exports, and when one is tried again."""
