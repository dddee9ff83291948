"""How much exists or runs at once: bounds that the engine keeps and that the memory planner counts with.

They stand here, above both, so that neither copies a number of the other.
"""

TARGET_TOKENS = 512
"""Tokens over all rows that keep a GPU busy: a longer block runs in pieces of about that size.

What a column may not see of later pieces is never computed, nor do all scores exist at once.
"""
MIN_COLUMNS = 128
"""The fewest columns of a piece, whatever the rows."""
MAX_TOKENS = 8192
"""The most tokens of a piece. It goes before MIN_COLUMNS: a Mac ends GPU work that keeps its display waiting."""
HEAD_LOGITS = 1 << 25
"""Logits that the head computes at once in an update: 128 MiB in float32, 220 positions of 152,064 tokens."""
PREFILL_TOKENS = 16384
"""Image tokens of the comparisons that a judge runs together: about 1 GB of keys and values of a 7B model."""
PREFIX_BYTES = 2 << 30
"""Keys and values of prefixes that are kept: some 80 first images of 512 by 512 pixels at the size of a 7B model."""
VISION_TOKENS = 1024
"""Images of one size run through the vision tower together as soon as they have that many tokens.

On two CPU cores runs of 300 to 2,000 are alike; runs of 4,096 take a tenth to a half longer, because activations no
longer fit in the cache.
"""
FEATURE_BYTES = 2 << 30
"""Image features that are kept: some 900 images of 512 by 512 pixels at the size of a 7B model."""
STEPS_TOGETHER = 8
"""Tokens that are written between two looks at them: a look waits for the device."""
RUNS_AHEAD = 3
"""Storage of keys and values that has to grow gets room for this many runs of STEPS_TOGETHER tokens."""
ANSWER_TOKENS = 8
"""Tokens that a completion may still write after its reasoning was closed for it."""


def piece_columns(rows: int) -> int:
    """How many columns of `rows` rows run through the layers together."""
    return max(min(MIN_COLUMNS, MAX_TOKENS // rows), TARGET_TOKENS // rows, 1)


def row_copies(length: int, completion: int, samples: int) -> int:
    """How often a comparison's keys and values exist while `samples` completions are written behind it.

    Branches of one row look at each other's columns only to find them masked. As many branches share a row as write no
    more columns than the comparison has, so a row is at most twice as long as it would be for one.
    """
    return -(-samples // max(1, min(samples, length // completion)))
