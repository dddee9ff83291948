"""Bounds on memory and work at a time: the engine keeps them, the memory planner uses them.

They are here so that neither copies the other's numbers.
"""

TARGET_TOKENS = 512
"""Tokens over all rows that keep a GPU busy: a longer block runs in pieces of about that size.

This also skips attention to later pieces, and never holds all scores at once.
"""
MIN_COLUMNS = 128
"""The fewest columns of a piece, for any number of rows."""
MAX_TOKENS = 8192
"""The most tokens of a piece. It overrides MIN_COLUMNS: a Mac ends GPU work that blocks its display."""
HEAD_LOGITS = 1 << 25
"""Logits that the head computes at once in an update: 128 MiB in float32, 220 positions of 152,064 tokens."""
PREFILL_TOKENS = 16384
"""Image tokens of a judge's batch of comparisons: about 1 GB of keys and values of a 7B model."""
PREFIX_BYTES = 2 << 30
"""Bytes of cached prefixes: some 80 first images of 512 by 512 pixels at the size of a 7B model."""
VISION_TOKENS = 1024
"""The vision tower runs images of one size together in batches of about this many tokens.

On two CPU cores runs of 300 to 2,000 are alike; runs of 4,096 take a tenth to a half longer, because activations no
longer fit in the cache.
"""
FEATURE_BYTES = 2 << 30
"""Bytes of cached image features: some 900 images of 512 by 512 pixels at the size of a 7B model."""
FEATURE_FILE_BYTES = 4 << 30
"""Bytes of image features on disk: of 512 by 512 pixels some 1,800 images of Qwen2.5-VL-7B, 500 of Qwen3-VL-8B."""
STEPS_TOGETHER = 8
"""Tokens between two reads by the host, as a read waits for the device."""
RUNS_AHEAD = 3
"""Growing storage of keys and values gets room for this many runs of STEPS_TOGETHER tokens."""
STATE_CHUNK = 32
"""Tokens of a chunk of recurrent layers where MLX has no kernel: on a CPU no larger ones are faster."""
ANSWER_TOKENS = 8
"""The most tokens of a completion after the closed end of its reasoning."""


def piece_columns(rows: int) -> int:
    """The columns of a piece with `rows` rows."""
    return max(min(MIN_COLUMNS, MAX_TOKENS // rows), TARGET_TOKENS // rows, 1)


def state_chunk(columns: int) -> int:
    """The columns of a recurrent layer's chunk in a block: those of a short block are one, a power of two."""
    return min(STATE_CHUNK, 1 << (columns - 1).bit_length())


def row_copies(length: int, completion: int, samples: int) -> int:
    """The copies of a comparison's keys and values for `samples` completions.

    Attention masks the columns of a row's other branches, at full cost. Branches share a row as long as their columns
    together are no more than the comparison's, so a row is at most twice as long as for one.
    """
    return -(-samples // max(1, min(samples, length // completion)))
