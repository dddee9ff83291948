"""A prompt and two images become verdicts, preferences and rankings; metrics measure their agreement with people."""
