"""A prompt and two images become verdicts, preferences and rankings; and how well these agree with people."""
