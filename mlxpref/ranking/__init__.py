"""Numbers only: strengths and intervals from judged pairs, which pair to ask next, temperature."""
