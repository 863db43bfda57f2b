"""Which rules turn a scenario and its updates into a state, where no key of the scenario says it.

1, written nowhere: sums in floating point, and free steps of projecting nodes unless asked otherwise.
2: exact sums that are divided once, and steps within the adaptive basis unless asked otherwise.

The number grows whenever the same updates under the same keys would give other bits, or be read
otherwise: a ledger of other rules can be looked at and verified, but not replayed or continued.
"""

RULES = 2
