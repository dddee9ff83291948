"""What one request may ask of this machine, and how much may wait. Beyond it a client gets an error, not the judge."""

BODY_BYTES = 64 << 20
"""Of one request: some forty PNGs of 1024 x 1024 pixels in base64."""
BODY_SECONDS = 60.0
"""In which a body must arrive: a client that dawdles holds no place in the queue, only the bytes that it announced."""
HELD_BYTES = 4 * BODY_BYTES
"""Of all requests that are not answered yet."""
WAITING = 256
"""Requests in the queue: some clients send a hundred at once."""
IMAGES = 512
"""In one request."""
PIXELS = 32 << 20
"""Of one image: 5792 x 5792. A small file may claim many."""
ALL_PIXELS = 256 << 20
"""Of a request's images as they are judged: a gigabyte."""
FEATURE_BYTES = 256 << 20
"""Of what is kept of images: those of a group may come in several requests, those of a training come once."""
PROMPT_CHARACTERS = 10_000
"""Longer text is a document."""
COMPLETIONS = 16
"""Of one chat request."""
