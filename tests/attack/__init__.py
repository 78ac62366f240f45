"""The attack: faults, damaged files and interruptions by the thousand, counted. ``make attack`` runs it.

Each part has a seed and a number of tries, prints what it found and ends with exit code 1 if anything did not hold. A
quick form of each is in tests/test_attack.py; the figures are in docs/reliability.md.
"""
