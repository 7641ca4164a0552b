"""The verbs of `poller`, one module for each family. A module has `add(verbs)`."""
