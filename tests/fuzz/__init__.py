"""A fuzz campaign: whatever comes in, the outcome is the right answer or one of our errors.

    rule      what counts as a failure
    damage    damaged bytes and changed JSON
    targets   what is tried, one file for each kind of input
    worker    the process that does it
    campaign  the process that watches the worker, and counts

`make fuzz SECONDS=3600` runs it; docs/security.md has the numbers.
"""
