"""What breaks a run of weeks, done on purpose to a real Ray, and what mmray promises of it.

`python -m tests.faults` runs every fault and writes the table of docs/reliability.md; names after it choose some.
`python -m tests.faults soak` kills at random for as long as it takes. Few and quick ones run with the tests
(tests/jobs/test_interrupts.py).
"""
