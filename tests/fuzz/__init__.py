"""Fuzz targets: whatever bytes come from outside, only documented errors leave a parser, and in time.

targets.py has one for each group of parsers; `python -m tests.fuzz NAME` runs one for long, test_targets.py all for
seconds. A new parser of foreign bytes gets a kind here and a document of its own in corpus/.
"""
